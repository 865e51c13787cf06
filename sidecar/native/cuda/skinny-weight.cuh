// Skinny products, the parts that depend on the types: 16 bytes of weights as tensor-core operands.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "warp-tensor.cuh"

namespace kvs {

/** 16 bytes of a weight row as pairs of T; the order of K does not matter as long as x has the same. */
template <typename T, bool is_fp8>
struct WeightChunk;

template <typename T>
struct WeightChunk<T, false> {
  static constexpr int values = 8;
  static __device__ __forceinline__ void unpack(const uint4& chunk, uint32_t (&pairs)[4]) {
    pairs[0] = chunk.x;
    pairs[1] = chunk.y;
    pairs[2] = chunk.z;
    pairs[3] = chunk.w;
  }
};

/** Two E4M3 values, in the upper bytes of each half, as T: exponent and mantissa move to where T has them, then a
 * product by a power of two corrects the bias. Exact, subnormals too. */
template <typename T>
__device__ __forceinline__ uint32_t e4m3_pair(uint32_t upper);
template <>
__device__ __forceinline__ uint32_t e4m3_pair<__nv_bfloat16>(uint32_t upper) {
  const uint32_t bits = (upper & 0x80008000u) | (upper & 0x7f007f00u) >> 4;
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(bits), "r"(0x7b807b80u), "r"(0x80008000u));  // 2^120, -0
  return pair;
}
template <>
__device__ __forceinline__ uint32_t e4m3_pair<__half>(uint32_t upper) {
  const uint32_t bits = (upper & 0x80008000u) | (upper & 0x7f007f00u) >> 1;
  uint32_t pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(bits), "r"(0x5c005c00u));  // 2^8
  return pair;
}

template <typename T>
struct WeightChunk<T, true> {
  static constexpr int values = 16;
  static __device__ __forceinline__ void unpack(const uint4& chunk, uint32_t (&pairs)[8]) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = e4m3_pair<T>(__byte_perm(words[i], 0, 0x1404));
      pairs[2 * i + 1] = e4m3_pair<T>(__byte_perm(words[i], 0, 0x3424));
    }
  }
};

}  // namespace kvs
