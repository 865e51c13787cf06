// Whole lines are appended with one write each, so that processes that start together do not mix theirs.

#include "plan-file.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "../kvasir.h"

namespace kvs {

namespace {

/** Beside this library. */
std::string plan_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&kvs_abi_version), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string library = info.dli_fname;
  const size_t slash = library.rfind('/');
  return (slash == std::string::npos ? std::string("./") : library.substr(0, slash + 1)) + "matmul-plans.txt";
}

}  // namespace

PlanFile::PlanFile(std::string prefix) : prefix_(std::move(prefix)), path_(plan_path()) {
  std::ifstream file(path_);
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string key;
    cublaslt::Algorithm algorithm{};
    if (!(fields >> key) || key.rfind(prefix_, 0) != 0) continue;
    fields >> std::hex;
    bool is_whole = true;
    for (uint64_t& word : algorithm.data) is_whole = is_whole && static_cast<bool>(fields >> word);
    if (is_whole) algorithms_[key] = algorithm;
  }
}

std::optional<cublaslt::Algorithm> PlanFile::find(const std::string& key) const {
  const auto found = algorithms_.find(prefix_ + key);
  if (found == algorithms_.end()) return std::nullopt;
  return found->second;
}

void PlanFile::add(const std::string& key, const cublaslt::Algorithm& algorithm) const {
  std::string line = prefix_ + key;
  for (const uint64_t word : algorithm.data) {
    char text[24];
    std::snprintf(text, sizeof text, " %" PRIx64, word);
    line += text;
  }
  line += '\n';
  const int file = open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  if (file < 0) return;
  const ssize_t written = write(file, line.data(), line.size());
  static_cast<void>(written);
  close(file);
}

}  // namespace kvs
