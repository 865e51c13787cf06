// Algorithms that were found fastest, kept beside the library: a text file of one line each, "key algorithm". Keys
// name the GPU and the version of the product library; lines that make no sense are skipped.

#pragma once

#include <optional>
#include <string>
#include <unordered_map>

#include "cublaslt-api.h"

namespace kvs {

class PlanFile {
 public:
  /** prefix: what all keys of this process begin with. */
  explicit PlanFile(std::string prefix);

  std::optional<cublaslt::Algorithm> find(const std::string& key) const;
  /** Appends a line. A file that cannot be written only costs time at the next start. */
  void add(const std::string& key, const cublaslt::Algorithm& algorithm) const;

 private:
  std::string prefix_;
  std::string path_;
  std::unordered_map<std::string, cublaslt::Algorithm> algorithms_;
};

}  // namespace kvs
