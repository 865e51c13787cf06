// The order of F8E4M3 matrices in device memory: weights, and the activations that the library multiplies them with.
// Rows are whole blocks of 64 values, the last one filled up with zeros. Within a block values are permuted so that 16
// contiguous bytes are what one lane of the tensor cores holds of a row in four steps of 16 values (wgmma and mma
// alike: of each step values 2 q, 2 q + 1, 2 q + 8, 2 q + 9 for lane 4 g + q), and so that of the four bytes of a step,
// those in the lower bytes of the word's halves and those in the upper ones become two registers without further
// permutation. A product of two matrices in this order is the product of the same matrices in any other.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kvs {

inline constexpr uint32_t fp8_block = 64;

/** Bytes of a row of so many values. */
__host__ __device__ inline uint32_t fp8_row_bytes(uint32_t cols) {
  return (cols + fp8_block - 1) / fp8_block * fp8_block;
}

/** Where value `col` of a row lies. Bits of the place from the highest: q (two), step (two), value of a pair, upper
 * half of the step's values; of the column: step, upper half, q, value of a pair. */
__host__ __device__ inline uint32_t fp8_place(uint32_t col) {
  const uint32_t step = col / 16 % 4;
  const uint32_t half = col / 8 % 2;
  const uint32_t q = col / 2 % 4;
  return col / fp8_block * fp8_block + q * 16 + step * 4 + col % 2 * 2 + half;
}

/** Of eight columns from `col` on, what lane 2 step + half of eight stores once they have exchanged values: 8 bytes, of
 * q = 2 half + step % 2 the steps 2 (step / 2) and the next. Where they begin. */
__host__ __device__ inline uint32_t fp8_eight_place(uint32_t col) {
  const uint32_t step = col / 16 % 4;
  const uint32_t half = col / 8 % 2;
  return col / fp8_block * fp8_block + (half * 2 + step % 2) * 16 + step / 2 * 8;
}

}  // namespace kvs
