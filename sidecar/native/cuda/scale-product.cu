// Scales after an FP8 product. Bound by bytes: a thread reads 16 of sums in each of a few rows, so that the scales of
// its outputs and their biases are read once for all of them.

#include "scale-product.h"

#include <algorithm>

#include "cuda-error.h"
#include "dtype.h"
#include "launch.cuh"
#include "warp-tensor.cuh"

namespace kvs {

namespace {

constexpr uint32_t threads = 128;
constexpr uint32_t rows_each = 4;

/** `width` neighbours, moved 16 bytes at a time where there are so many. */
template <class T, uint32_t width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T values[width];
};

template <uint32_t width, class T>
__device__ Pack<T, width> load(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

template <class Y, class Sum>
struct Operands {
  Y* y;
  const Sum* sums;
  const float* row_scales;
  const float* output_scales;
  const float* bias;
  uint32_t rows;
  uint32_t outputs;
  bool is_accumulating;
};

template <uint32_t width, class Y, class Sum>
__global__ void __launch_bounds__(threads) scale_product_kernel(Operands<Y, Sum> o) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const uint32_t at = (blockIdx.x * threads + threadIdx.x) * width;
  if (at >= o.outputs) return;
  const Pack<float, width> scales = load<width>(o.output_scales + at);
  Pack<float, width> bias{};
  if (o.bias != nullptr) bias = load<width>(o.bias + at);
  for (uint32_t begin = blockIdx.y * rows_each; begin < o.rows; begin += gridDim.y * rows_each) {
    Pack<Sum, width> sums[rows_each];
    Pack<Y, width> before[rows_each];
#pragma unroll
    for (uint32_t r = 0; r < rows_each; ++r) {
      if (begin + r >= o.rows) break;
      const uint64_t offset = static_cast<uint64_t>(begin + r) * o.outputs + at;
      sums[r] = load<width>(o.sums + offset);
      if (o.is_accumulating) before[r] = load<width>(static_cast<const Y*>(o.y) + offset);
    }
#pragma unroll
    for (uint32_t r = 0; r < rows_each; ++r) {
      if (begin + r >= o.rows) break;
      const float row_scale = o.row_scales[begin + r];
      Pack<Y, width> out;
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) {
        // One scale after the other: the product of two small ones could underflow.
        float value = to_float(sums[r].values[k]) * row_scale * scales.values[k] + bias.values[k];
        if (o.is_accumulating) value += to_float(before[r].values[k]);
        out.values[k] = from_float<Y>(value);
      }
      *reinterpret_cast<Pack<Y, width>*>(o.y + static_cast<uint64_t>(begin + r) * o.outputs + at) = out;
    }
  }
}

template <class Y, class Sum>
void launch_scale_product(const ScaleProductArgs& args, cudaStream_t stream) {
  constexpr uint32_t row_blocks_max = 65535;  // of a grid
  constexpr uint32_t width = Vector<Sum>::size;
  const Operands<Y, Sum> operands{static_cast<Y*>(args.y),
                                  static_cast<const Sum*>(args.sums),
                                  args.row_scales,
                                  args.output_scales,
                                  args.bias,
                                  args.rows,
                                  args.outputs,
                                  args.is_accumulating};
  const bool has_vectors = args.outputs % width == 0 && is_aligned(args.y, 16) && is_aligned(args.sums, 16) &&
                           is_aligned(args.output_scales, 16) && is_aligned(args.bias, 16);
  const auto kernel = has_vectors ? scale_product_kernel<width, Y, Sum> : scale_product_kernel<1, Y, Sum>;
  const uint32_t elements = has_vectors ? args.outputs / width : args.outputs;
  const dim3 grid((elements + threads - 1) / threads,
                  std::min(row_blocks_max, (args.rows + rows_each - 1) / rows_each));
  check_cuda(launch(kernel, grid, threads, 0, stream, operands), "scale_product");
}

}  // namespace

void scale_product(const ScaleProductArgs& args, cudaStream_t stream) {
  if (args.sums_dtype == KVS_F32) return launch_scale_product<float, float>(args, stream);
  with_type(args.y_dtype, [&](auto type) { launch_scale_product<decltype(type), __nv_bfloat16>(args, stream); });
}

}  // namespace kvs
