// Conversions of element type on the device.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kvasir.h"

namespace kvs {

/** y[i] = x[i] for `count` elements of F32, F16 or BF16. */
void convert(void* y, kvs_dtype y_dtype, const void* x, kvs_dtype x_dtype, uint64_t count, cudaStream_t stream);

/** Each row of x (rows, cols) as F8E4M3 in the order of fp8-order.h, with a scale of its own, its largest magnitude
 * / 448: x = scale * y. */
void quantise_rows(void* y, float* scales, const void* x, kvs_dtype x_dtype, uint32_t rows, uint32_t cols,
                   cudaStream_t stream);

/** y (rows, cols) = the random matrix of random.h in its own type and order; scales (rows): F8E4M3 only. */
void fill_random(void* y, float* scales, kvs_dtype dtype, uint32_t rows, uint32_t cols, uint64_t seed,
                 float deviation, cudaStream_t stream);

}  // namespace kvs
