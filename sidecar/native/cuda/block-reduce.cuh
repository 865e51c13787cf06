// Reductions over a thread block: through shuffles, then once through shared memory.

#pragma once

#include <cstdint>

namespace kvs {

struct Sum {
  __device__ static float identity() { return 0.0f; }
  __device__ static float combine(float a, float b) { return a + b; }
};
struct Max {
  __device__ static float identity() { return -INFINITY; }
  __device__ static float combine(float a, float b) { return fmaxf(a, b); }
};

template <class Operation>
__device__ inline float warp_reduce(float value) {
  for (uint32_t offset = 16; offset > 0; offset /= 2) {
    value = Operation::combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  }
  return value;
}

/** The same value in every thread. blockDim.x is a multiple of 32. May follow itself without a barrier between. */
template <class Operation>
__device__ inline float block_reduce(float value) {
  __shared__ float partials[32];
  value = warp_reduce<Operation>(value);
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warps = blockDim.x / 32;
  if (warps == 1) return value;
  __syncthreads();  // an earlier reduction's partials are read by now
  if (lane == 0) partials[warp] = value;
  __syncthreads();
  return warp_reduce<Operation>(lane < warps ? partials[lane] : Operation::identity());
}

}  // namespace kvs
