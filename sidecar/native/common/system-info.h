// What the operating system says about processor and memory.

#pragma once

#include <cstdint>
#include <string>

namespace kvs {

struct MemoryInfo {
  uint64_t free_bytes;
  uint64_t total_bytes;
};

/** Of the machine or of the cgroup, whichever is tighter. */
MemoryInfo memory_info();
/** Safe inside a JSON string. */
std::string processor_name();

}  // namespace kvs
