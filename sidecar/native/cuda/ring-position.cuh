// A ring of stages in shared memory: where a thread is in it.

#pragma once

#include <cstdint>

namespace kvs {

/** A place in a ring of `size`, and the parity of the lap. */
template <int size>
struct RingPosition {
  int at = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++at == size) {
      at = 0;
      parity ^= 1;
    }
  }
};

}  // namespace kvs
