// Owners of device and pinned memory, and the map of what callers were given.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "cuda-error.h"

namespace kvs {

/** An allocation and its size; empty when it was moved from. */
template <void (*free)(void*)>
class OwnedMemory {
 public:
  template <class T = char>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  uint64_t bytes() const { return is_empty() ? 0 : bytes_; }
  bool is_empty() const { return data_ == nullptr; }

 protected:
  OwnedMemory() = default;
  OwnedMemory(void* data, uint64_t bytes) : data_(data), bytes_(bytes) {}

 private:
  struct Free {
    void operator()(void* data) const { free(data); }
  };

  std::unique_ptr<void, Free> data_;
  uint64_t bytes_ = 0;
};

void free_device(void* data);
void free_pinned(void* data);

/** Device memory, 256-byte aligned. Throws Failure(KVS_OUT_OF_MEMORY) with the numbers. */
class DeviceMemory : public OwnedMemory<free_device> {
 public:
  DeviceMemory() = default;
  DeviceMemory(uint64_t bytes, const char* purpose);
};

/** Page-locked host memory, 4096-byte aligned, zeroed; the same address on both sides. */
class PinnedMemory : public OwnedMemory<free_pinned> {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(uint64_t bytes);
};

/** Allocations by address, so that every address that comes in is checked against what was handed out. */
template <class Memory>
class AddressMap {
 public:
  uint64_t add(Memory memory) {
    const uint64_t address = reinterpret_cast<uint64_t>(memory.as());
    allocations_.emplace(address, std::move(memory));
    return address;
  }
  /** False when nothing was allocated at this very address. */
  bool release(uint64_t address) { return allocations_.erase(address) != 0; }
  bool contains(uint64_t address, uint64_t bytes) const {
    auto next = allocations_.upper_bound(address);
    if (next == allocations_.begin()) return false;
    --next;
    const uint64_t offset = address - next->first;
    return offset <= next->second.bytes() && bytes <= next->second.bytes() - offset;
  }
  void clear() { allocations_.clear(); }

 private:
  std::map<uint64_t, Memory> allocations_;
};

}  // namespace kvs
