// A compute thread's own memory, allocated once: kernels take what they need from it and give nothing back
// until the next item. take() is always inlined: it is compiled in files of different instruction sets, and the linker
// must not pick one of them for all.

#pragma once

#include <cstdint>

#include "host-memory.h"

namespace kvs {

class Scratch {
 public:
  explicit Scratch(uint64_t bytes) : memory_(bytes) {}

  void reset() { used_ = 0; }
  /** 64-byte aligned, uninitialised. The capacity is computed from the configuration: running out is a bug. */
  template <class T>
  __attribute__((always_inline)) T* take(uint64_t count) {
    T* at = reinterpret_cast<T*>(memory_.data() + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    if (__builtin_expect(used_ > memory_.bytes(), 0)) __builtin_trap();
    return at;
  }

 private:
  HostMemory memory_;
  uint64_t used_ = 0;
};

}  // namespace kvs
