// Start-up work (weights) and the quantisation of activations.

#include <algorithm>

#include "../common/random.h"
#include "block-reduce.cuh"
#include "convert.h"
#include "cuda-error.h"
#include "dtype.h"
#include "fp8-order.h"
#include "launch.cuh"
#include "warp-tensor.cuh"

namespace kvs {

namespace {

constexpr uint32_t threads = 256;
constexpr uint32_t row_threads_max = 512;
constexpr uint32_t blocks_max = 65535;

template <class Y, class X>
__global__ void convert_kernel(Y* y, const X* x, uint64_t count) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    y[i] = from_float<Y>(to_float(x[i]));
  }
}

/** A row of next to nothing becomes zeros: the inverse of its scale would be infinite. */
__device__ float row_scale(float largest) { return largest > 1e-30f ? largest / f8_max : 1.0f; }

/** One block a row, stored in the order of fp8-order.h; value(col) is evaluated twice. */
template <class Value>
__device__ void quantise_row(__nv_fp8_e4m3* y, float* scale_out, uint32_t cols, const Value& value) {
  float largest = 0.0f;
  for (uint32_t col = threadIdx.x; col < cols; col += blockDim.x) largest = fmaxf(largest, fabsf(value(col)));
  largest = block_reduce<Max>(largest);
  const float scale = row_scale(largest);
  if (threadIdx.x == 0) *scale_out = scale;
  for (uint32_t col = threadIdx.x; col < fp8_row_bytes(cols); col += blockDim.x) {
    y[fp8_place(col)] = from_float<__nv_fp8_e4m3>(col < cols ? value(col) / scale : 0.0f);
  }
}

/** E4M3 values of neighbouring columns, in pairs as they are converted. */
template <uint32_t width>
struct alignas(width) Narrow {
  __nv_fp8x2_storage_t pairs[width / 2];
  __device__ __nv_fp8_storage_t value(uint32_t k) const { return static_cast<uint8_t>(pairs[k / 2] >> (k % 2 * 8)); }
};

/** To their places in the row y. All lanes of the warp, even those past the row's end, which store nothing. */
template <uint32_t width>
__device__ void store_permuted(__nv_fp8_e4m3* y, uint32_t col, uint32_t row_bytes, const Narrow<width>& narrow) {
  if (col >= row_bytes) return;
#pragma unroll
  for (uint32_t k = 0; k < width; ++k) y[fp8_place(col + k)].__x = narrow.value(k);
}

/** Eight columns a lane: eight lanes have a block of 64, lane 2 step + half the values of a half of a step, and hand
 * one another what lies together, so that each stores 8 bytes. */
template <>
__device__ void store_permuted<8>(__nv_fp8_e4m3* y, uint32_t col, uint32_t row_bytes, const Narrow<8>& narrow) {
  const uint2 mine = *reinterpret_cast<const uint2*>(&narrow);  // values of q 0 and 1; of 2 and 3
  const bool is_upper = threadIdx.x % 2 != 0;                   // half of the step; it takes q 2 and 3
  const uint32_t kept = is_upper ? mine.y : mine.x;
  const uint32_t other = __shfl_xor_sync(full_warp, is_upper ? mine.x : mine.y, 1);
  const uint32_t lower_half = is_upper ? other : kept;
  const uint32_t upper_half = is_upper ? kept : other;
  const uint32_t even_q = __byte_perm(lower_half, upper_half, 0x5140);  // the step's four values of a q
  const uint32_t odd_q = __byte_perm(lower_half, upper_half, 0x7362);
  const bool is_odd_step = threadIdx.x / 2 % 2 != 0;  // it takes the odd q of this step and the one before
  const uint32_t same_step = is_odd_step ? odd_q : even_q;
  const uint32_t other_step = __shfl_xor_sync(full_warp, is_odd_step ? even_q : odd_q, 2);
  const uint2 stored = is_odd_step ? uint2{other_step, same_step} : uint2{same_step, other_step};
  if (col < row_bytes) *reinterpret_cast<uint2*>(y + fp8_eight_place(col)) = stored;
}

/** The largest magnitude of values that come in pairs, which 16-bit types compare at once. */
template <class X>
struct Largest {
  float2 pair = {0.0f, 0.0f};
  __device__ void add(const X* two) {
    pair = {fmaxf(pair.x, fabsf(to_float(two[0]))), fmaxf(pair.y, fabsf(to_float(two[1])))};
  }
  __device__ float value() const { return fmaxf(pair.x, pair.y); }
};
template <class X, class Pair>
struct LargestOfHalves {
  Pair pair = {};
  __device__ void add(const X* two) { pair = __hmax2(pair, __habs2(*reinterpret_cast<const Pair*>(two))); }
  __device__ float value() const { return fmaxf(__low2float(pair), __high2float(pair)); }
};
template <>
struct Largest<__nv_bfloat16> : LargestOfHalves<__nv_bfloat16, __nv_bfloat162> {};
template <>
struct Largest<__half> : LargestOfHalves<__half, __half2> {};

/** The row waits in registers for its largest value: `vectors` of 16 bytes a thread. */
template <class X, uint32_t vectors>
__global__ void __launch_bounds__(row_threads_max)
    quantise_vectors_kernel(__nv_fp8_e4m3* y, float* scales, const X* x, uint32_t cols) {
  constexpr uint32_t width = Vector<X>::size;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const uint64_t row = blockIdx.x;
  const uint32_t row_bytes = fp8_row_bytes(cols);
  Vector<X> held[vectors] = {};
#pragma unroll
  for (uint32_t v = 0; v < vectors; ++v) {
    const uint32_t at = (v * blockDim.x + threadIdx.x) * width;
    if (at < cols) held[v] = *reinterpret_cast<const Vector<X>*>(x + row * cols + at);
  }
  Largest<X> largest;
#pragma unroll
  for (uint32_t v = 0; v < vectors; ++v) {
#pragma unroll
    for (uint32_t k = 0; k < width; k += 2) largest.add(&held[v].values[k]);
  }
  const float scale = row_scale(block_reduce<Max>(largest.value()));
  if (threadIdx.x == 0) scales[row] = scale;
  const float inverse = 1.0f / scale;
#pragma unroll
  for (uint32_t v = 0; v < vectors; ++v) {
    if (v * blockDim.x * width >= row_bytes) break;  // the same for all threads
    Narrow<width> narrow;
#pragma unroll
    for (uint32_t k = 0; k < width; k += 2) {
      const float2 two = {to_float(held[v].values[k]) * inverse, to_float(held[v].values[k + 1]) * inverse};
      narrow.pairs[k / 2] = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
    }
    store_permuted<width>(y + row * row_bytes, (v * blockDim.x + threadIdx.x) * width, row_bytes, narrow);
  }
}

/** False: the rows are too long, or not in whole vectors. */
template <class X>
bool quantise_vectors(__nv_fp8_e4m3* y, float* scales, const X* x, uint32_t rows, uint32_t cols,
                      cudaStream_t stream) {
  constexpr uint32_t vectors_max = 8;
  const uint32_t vectors = fp8_row_bytes(cols) / Vector<X>::size;
  if (cols % Vector<X>::size != 0 || vectors > row_threads_max * vectors_max || !is_aligned(x, 16)) return false;
  const uint32_t each = (vectors + row_threads_max - 1) / row_threads_max;
  const uint32_t row_threads = ((vectors + each - 1) / each + 31) / 32 * 32;
  const auto kernel = each == 1   ? quantise_vectors_kernel<X, 1>
                      : each == 2 ? quantise_vectors_kernel<X, 2>
                      : each <= 4 ? quantise_vectors_kernel<X, 4>
                                  : quantise_vectors_kernel<X, vectors_max>;
  check_cuda(launch(kernel, rows, row_threads, 0, stream, y, scales, x, cols), "quantise_rows");
  return true;
}

template <class X>
__global__ void quantise_rows_kernel(__nv_fp8_e4m3* y, float* scales, const X* x, uint32_t rows, uint32_t cols) {
  for (uint64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const X* from = x + row * cols;
    quantise_row(y + row * fp8_row_bytes(cols), scales + row, cols, [&](uint32_t col) { return to_float(from[col]); });
  }
}

template <class Y>
__global__ void fill_random_kernel(Y* y, uint64_t count, uint64_t seed, float scale) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    y[i] = from_float<Y>(random_weight(seed, i, scale));
  }
}

__global__ void fill_random_f8_kernel(__nv_fp8_e4m3* y, float* scales, uint32_t rows, uint32_t cols, uint64_t seed,
                                      float scale) {
  for (uint64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const uint64_t begin = row * cols;
    quantise_row(y + row * fp8_row_bytes(cols), scales + row, cols,
                 [&](uint32_t col) { return random_weight(seed, begin + col, scale); });
  }
}

uint32_t blocks_for(uint64_t count) {
  return static_cast<uint32_t>(std::min<uint64_t>((count + threads - 1) / threads, blocks_max));
}

}  // namespace

void convert(void* y, kvs_dtype y_dtype, const void* x, kvs_dtype x_dtype, uint64_t count, cudaStream_t stream) {
  with_type(y_dtype, [&](auto y_type) {
    with_type(x_dtype, [&](auto x_type) {
      using Y = decltype(y_type);
      using X = decltype(x_type);
      convert_kernel<<<blocks_for(count), threads, 0, stream>>>(static_cast<Y*>(y), static_cast<const X*>(x), count);
    });
  });
  check_launch("convert");
}

void quantise_rows(void* y, float* scales, const void* x, kvs_dtype x_dtype, uint32_t rows, uint32_t cols,
                   cudaStream_t stream) {
  with_type(x_dtype, [&](auto type) {
    using X = decltype(type);
    const X* from = static_cast<const X*>(x);
    __nv_fp8_e4m3* to = static_cast<__nv_fp8_e4m3*>(y);
    if (quantise_vectors(to, scales, from, rows, cols, stream)) return;
    quantise_rows_kernel<<<std::min(rows, blocks_max), threads, 0, stream>>>(to, scales, from, rows, cols);
  });
  check_launch("quantise_rows");
}

void fill_random(void* y, float* scales, kvs_dtype dtype, uint32_t rows, uint32_t cols, uint64_t seed,
                 float deviation, cudaStream_t stream) {
  const float scale = random_weight_scale(deviation);
  const uint64_t count = static_cast<uint64_t>(rows) * cols;
  if (dtype == KVS_F8E4M3) {
    fill_random_f8_kernel<<<std::min(rows, blocks_max), threads, 0, stream>>>(static_cast<__nv_fp8_e4m3*>(y), scales,
                                                                              rows, cols, seed, scale);
  } else {
    with_type(dtype, [&](auto type) {
      using Y = decltype(type);
      fill_random_kernel<<<blocks_for(count), threads, 0, stream>>>(static_cast<Y*>(y), count, seed, scale);
    });
  }
  check_launch("fill_random");
}

}  // namespace kvs
