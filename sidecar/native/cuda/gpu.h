// The GPU that a device runs on, and whether it can.

#pragma once

#include <cstdint>
#include <string>

namespace kvs {

/** What the launchers want to know of the GPU. */
struct Gpu {
  std::string name;
  int index;
  int sm_count;
  int compute_capability;  // 80, 89, 90 ...
  uint64_t memory_bytes;
  int numa_node;  // nearest to it; -1: none is
};

/** Throws Failure(KVS_UNSUPPORTED), in one line that says what to do: no driver, too old a driver, no GPU, too small.
 */
Gpu find_gpu(uint32_t index);

}  // namespace kvs
