// Skinny products, the parts that depend on the types: 16 bytes of weights as tensor-core operands.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "warp-tensor.cuh"

namespace kvs {

/** 16 bytes of a weight row as pairs of T, the operands of 16-wide steps of K one after the other. Of 16-bit weights
 * the order of K does not matter as long as x has the same. */
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

/** Two E4M3 values, magnitudes where T has exponent and mantissa, as T: a product by a power of two corrects the bias.
 * Exact, subnormals too. */
template <typename T>
__device__ __forceinline__ uint32_t rebias_e4m3(uint32_t bits);
template <>
__device__ __forceinline__ uint32_t rebias_e4m3<__nv_bfloat16>(uint32_t bits) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(bits), "r"(0x7b807b80u), "r"(0x80008000u));  // 2^120, -0
  return pair;
}
template <>
__device__ __forceinline__ uint32_t rebias_e4m3<__half>(uint32_t bits) {
  uint32_t pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(bits), "r"(0x5c005c00u));  // 2^8
  return pair;
}

/** Four E4M3 values as pairs of T: those in the lower bytes of the word's halves, and those in the upper ones. */
template <typename T>
__device__ __forceinline__ void unpack_e4m3(uint32_t word, uint32_t& lower, uint32_t& upper) {
  constexpr int shift = std::is_same_v<T, __half> ? 1 : 4;  // from the upper byte to where T has the magnitude
  constexpr uint32_t signs = 0x80008000u;
  lower = rebias_e4m3<T>((word << 8 & signs) | (word & 0x007f007fu) << (8 - shift));
  upper = rebias_e4m3<T>((word & signs) | (word & 0x7f007f00u) >> shift);
}

/** In the order of fp8-order.h: two pairs of each of four steps of 16 values. */
template <typename T>
struct WeightChunk<T, true> {
  static constexpr int values = 16;
  static __device__ __forceinline__ void unpack(const uint4& chunk, uint32_t (&pairs)[8]) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_e4m3<T>(words[i], pairs[2 * i], pairs[2 * i + 1]);
  }
};

}  // namespace kvs
