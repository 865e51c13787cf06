// Prefix sums of 64-bit integers over a thread block of 1024: exact, whatever the order.

#pragma once

#include <cstdint>

namespace kvs {

inline constexpr uint32_t scan_threads = 1024;

__device__ inline uint64_t warp_inclusive_sum(uint64_t value) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint64_t below = __shfl_up_sync(0xFFFFFFFFu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

__device__ inline uint64_t warp_sum(uint64_t value) {
  for (uint32_t offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

/** Sum over the threads before this one. `partials` (32) is shared memory, free again after the next barrier. */
__device__ inline uint64_t block_exclusive_sum(uint64_t value, uint64_t* partials) {
  const uint32_t warp = threadIdx.x / 32;
  const uint64_t inclusive = warp_inclusive_sum(value);
  if (threadIdx.x % 32 == 31) partials[warp] = inclusive;
  __syncthreads();
  if (warp == 0) partials[threadIdx.x] = warp_inclusive_sum(partials[threadIdx.x]);
  __syncthreads();
  return inclusive - value + (warp == 0 ? 0 : partials[warp - 1]);
}

}  // namespace kvs
