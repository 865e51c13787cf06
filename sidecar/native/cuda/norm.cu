// kvs_rms_norm and kvs_layer_norm: one block a row, or every n-th row. A row is read once, eight values a thread, and
// kept in registers, as are the weights where there is room; rows of odd sizes or addresses go element by element.

#include <algorithm>

#include "block-reduce.cuh"
#include "device.h"
#include "dtype.h"
#include "launch.cuh"
#include "warp-tensor.cuh"

namespace kvs {

namespace {

constexpr uint32_t threads_max = 768;
constexpr uint32_t threads_per_sm = 1536;  // registers allow no more
constexpr uint32_t width = 8;              // neighbours that a thread holds: 16 bytes of y

struct NormArgs {
  const float* weight;
  const float* bias;  // layer norm only, may be null
  uint32_t size;
  float epsilon;
  bool is_rms;
};

/** y of one element: shift and scale are the row's. */
__device__ float normed(float x, float shift, float scale, float weight, float bias) {
  return fmaf((x - shift) * scale, weight, bias);
}

__device__ float bias_at(const NormArgs& args, uint32_t i) { return args.bias == nullptr ? 0.0f : args.bias[i]; }

/** `width` neighbours, moved 16 bytes at a time. */
template <class T>
struct alignas(16) Eight {
  T values[width];
};

/** The elements that this thread holds: up to `vectors` times eight. */
template <uint32_t vectors>
struct HeldRow {
  Eight<float> held[vectors];

  __device__ static uint32_t at(uint32_t vector) { return (vector * blockDim.x + threadIdx.x) * width; }

  __device__ void load(const float* x, uint32_t size) {
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      held[v] = at(v) < size ? *reinterpret_cast<const Eight<float>*>(x + at(v)) : Eight<float>{};
    }
  }

  __device__ float sum() const {
    float total = 0.0f;
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) total += held[v].values[k];
    }
    return block_reduce<Sum>(total);
  }

  __device__ float sum_of_squares(float shift, uint32_t size) const {
    float total = 0.0f;
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      if (at(v) >= size) break;
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) {
        const float d = held[v].values[k] - shift;
        total = fmaf(d, d, total);
      }
    }
    return block_reduce<Sum>(total);
  }

  template <class T, class Weights>
  __device__ void store(T* y, float shift, float scale, const Weights& weights, const NormArgs& args) const {
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      if (at(v) >= args.size) break;
      const Eight<float> weight = weights.get(v, at(v));
      Eight<T> eight;
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) {
        const float value = normed(held[v].values[k], shift, scale, weight.values[k], bias_at(args, at(v) + k));
        eight.values[k] = from_float<T>(value);
      }
      *reinterpret_cast<Eight<T>*>(y + at(v)) = eight;
    }
  }
};

/** The weights of the elements that a HeldRow<vectors> holds: in registers, too, where these suffice for both. */
template <uint32_t vectors>
struct Weights {
  static constexpr bool are_held = vectors <= 2;
  const float* all;
  HeldRow<are_held ? vectors : 1> row;

  __device__ Weights(const float* weight, uint32_t size) : all(weight) {
    if constexpr (are_held) row.load(weight, size);
  }
  /** Into the level-2 cache, and no further: the kernel before may be the one that writes them. */
  __device__ static void prefetch(const float* weight, uint32_t size) {
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      const uint32_t at = HeldRow<vectors>::at(v);
      if (at < size) prefetch_to_l2(weight + at);
    }
  }
  /** Of a vector; i: its place in the row. */
  __device__ Eight<float> get(uint32_t vector, uint32_t i) const {
    if constexpr (are_held) return row.held[vector];
    return *reinterpret_cast<const Eight<float>*>(all + i);
  }
};

template <class T, uint32_t vectors>
__global__ void __launch_bounds__(threads_max, vectors == 1 ? threads_per_sm / threads_max : 1)
    norm_vectors_kernel(T* y, const float* x, uint32_t row_count, NormArgs args) {
  let_next_kernel_start();
  Weights<vectors>::prefetch(args.weight, args.size);
  wait_for_previous_kernels();
  const Weights<vectors> weights(args.weight, args.size);
  const float size = static_cast<float>(args.size);
  const auto at = [&](uint32_t r) { return static_cast<uint64_t>(r) * args.size; };
  constexpr bool is_ahead = vectors == 1;  // there are registers for the row to come
  HeldRow<vectors> next;
  if (is_ahead) next.load(x + at(blockIdx.x), args.size);
  for (uint32_t r = blockIdx.x; r < row_count; r += gridDim.x) {
    if (!is_ahead) next.load(x + at(r), args.size);
    const HeldRow<vectors> row = next;
    if (is_ahead && r + gridDim.x < row_count) next.load(x + at(r + gridDim.x), args.size);
    const float mean = args.is_rms ? 0.0f : row.sum() / size;
    const float scale = 1.0f / sqrtf(row.sum_of_squares(mean, args.size) / size + args.epsilon);
    row.store(y + at(r), mean, scale, weights, args);
  }
}

template <class T>
__global__ void norm_elements_kernel(T* y, const float* x, NormArgs args) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const uint64_t begin = static_cast<uint64_t>(blockIdx.x) * args.size;
  const float* from = x + begin;
  const float size = static_cast<float>(args.size);
  float mean = 0.0f;
  if (!args.is_rms) {
    float total = 0.0f;
    for (uint32_t i = threadIdx.x; i < args.size; i += blockDim.x) total += from[i];
    mean = block_reduce<Sum>(total) / size;
  }
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x; i < args.size; i += blockDim.x) {
    const float d = from[i] - mean;
    squares = fmaf(d, d, squares);
  }
  const float scale = 1.0f / sqrtf(block_reduce<Sum>(squares) / size + args.epsilon);
  for (uint32_t i = threadIdx.x; i < args.size; i += blockDim.x) {
    y[begin + i] = from_float<T>(normed(from[i], mean, scale, args.weight[i], bias_at(args, i)));
  }
}

template <class T>
cudaError_t launch_norm(T* y, const float* x, uint32_t row_count, const NormArgs& args, int sm_count,
                        cudaStream_t stream) {
  constexpr uint32_t vectors_max = 4;
  const uint32_t vectors = (args.size + width - 1) / width;
  const bool is_aligned_all = is_aligned(x, 16) && is_aligned(y, 16) && is_aligned(args.weight, 16);
  if (args.size % width != 0 || vectors > threads_max * vectors_max || !is_aligned_all) {
    return launch(norm_elements_kernel<T>, row_count, 256, 0, stream, y, x, args);
  }
  const uint32_t each = (vectors + threads_max - 1) / threads_max;
  const uint32_t threads = ((vectors + each - 1) / each + 31) / 32 * 32;
  const uint32_t blocks = std::min(row_count, static_cast<uint32_t>(sm_count) * (threads_per_sm / threads));
  const auto launch_kernel = [&](auto kernel) {
    return launch(kernel, blocks, threads, 0, stream, y, x, row_count, args);
  };
  if (each == 1) return launch_kernel(norm_vectors_kernel<T, 1>);
  if (each == 2) return launch_kernel(norm_vectors_kernel<T, 2>);
  return launch_kernel(norm_vectors_kernel<T, vectors_max>);
}

kvs_status norm(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, const char* name, uint64_t weight,
                uint64_t bias, NormArgs args) {
  return with_device(device, [&](kvs_device& d) {
    check_rows(d, row_count);
    require(args.size > 0 && args.epsilon >= 0.0f, "%s: size must be positive, epsilon not negative", name);
    char* to = d.device_memory(y, d.compute_bytes(row_count, args.size), "y");
    const float* from = d.device_memory<const float>(x, f32_bytes(row_count, args.size), "x");
    args.weight = d.device_memory<const float>(weight, args.size * sizeof(float), "weight");
    args.bias = bias == 0 ? nullptr : d.device_memory<const float>(bias, args.size * sizeof(float), "bias");
    with_type(d.config.compute_dtype, [&](auto type) {
      using T = decltype(type);
      check_cuda(
          launch_norm(reinterpret_cast<T*>(to), from, row_count, args, d.gpu.sm_count, d.compute_stream()), name);
    });
  });
}

}  // namespace
}  // namespace kvs

extern "C" {

kvs_status kvs_rms_norm(kvs_device* device, uint64_t y, uint64_t x, uint64_t weight, uint32_t row_count,
                        uint32_t size, float epsilon) {
  return kvs::norm(device, y, x, row_count, "kvs_rms_norm", weight, 0, {nullptr, nullptr, size, epsilon, true});
}

kvs_status kvs_layer_norm(kvs_device* device, uint64_t y, uint64_t x, uint64_t weight, uint64_t bias,
                          uint32_t row_count, uint32_t size, float epsilon) {
  return kvs::norm(device, y, x, row_count, "kvs_layer_norm", weight, bias, {nullptr, nullptr, size, epsilon, false});
}

}  // extern "C"
