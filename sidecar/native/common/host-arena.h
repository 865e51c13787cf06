// The host tier's memory: slots and 4096-byte headers in one mapping, POSIX shared memory when there is room
// for it (it then survives the process), else anonymous huge pages.

#pragma once

#include <cstdint>
#include <string>

#include "../kvasir.h"

namespace kvs {

constexpr uint64_t arena_header_bytes = 4096;

class HostArena {
 public:
  /** name: "/kvasir-..." or NULL. Throws Failure when not even anonymous memory can be had. */
  HostArena(const char* name, uint32_t slot_count, uint64_t slot_bytes, const kvs_device_config& config);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  char* slot(uint32_t index) const { return slots_ + index * slot_bytes_; }
  uint32_t slot_count() const { return slot_count_; }
  void* mapping() const { return mapping_; }
  uint64_t mapping_bytes() const { return mapping_bytes_; }
  kvs_host_arena describe() const;
  /** The name goes; the memory stays until the end of this object. */
  void unlink();

 private:
  bool map_shared(const char* name, const kvs_device_config& config);

  std::string name_;
  uint32_t slot_count_;
  uint64_t slot_bytes_;
  uint64_t mapping_bytes_;
  void* mapping_ = nullptr;
  char* slots_ = nullptr;
  char* headers_ = nullptr;
  int descriptor_ = -1;
  bool is_shared_ = false;
  bool is_adopted_ = false;
};

}  // namespace kvs
