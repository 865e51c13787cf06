// Memory of weights. Small matrices share mappings, so that they lie in huge pages as large ones do: a decode step
// reads every one from front to back, and the processor's prefetchers stop at the end of a page.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "host-memory.h"

namespace kvs {

/** Zeroed memory of one weight; a mapping goes back with the last weight in it. */
struct WeightPiece {
  std::shared_ptr<HostMemory> mapping;
  char* data;
};

class WeightMemory {
 public:
  WeightPiece take(uint64_t bytes) {
    const uint64_t taken = (bytes + line_bytes - 1) / line_bytes * line_bytes;
    if (mapping_ == nullptr || taken > mapping_->bytes() - used_) {
      mapping_ = std::make_shared<HostMemory>(std::max(taken, mapping_bytes));
      used_ = 0;
    }
    char* data = mapping_->data() + used_;
    used_ += taken;
    return {mapping_, data};
  }

 private:
  static constexpr uint64_t line_bytes = 64;
  static constexpr uint64_t mapping_bytes = 32ull << 20;

  std::shared_ptr<HostMemory> mapping_;
  uint64_t used_ = 0;
};

}  // namespace kvs
