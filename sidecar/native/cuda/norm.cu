// kvs_rms_norm and kvs_layer_norm: one block a row. A row is read once, 16 bytes a thread, and kept in registers;
// rows of odd sizes or addresses go element by element.

#include <algorithm>

#include "block-reduce.cuh"
#include "device.h"
#include "dtype.h"

namespace kvs {

namespace {

struct NormArgs {
  const float* weight;
  const float* bias;  // layer norm only, may be null
  uint32_t size;
  float epsilon;
  bool is_rms;
};

/** y of one element: shift and scale are the row's. */
__device__ float normed(float x, uint32_t i, float shift, float scale, const NormArgs& args) {
  const float bias = args.bias == nullptr ? 0.0f : args.bias[i];
  return fmaf((x - shift) * scale, args.weight[i], bias);
}

/** Calls body(index, value) for the elements that this thread holds: up to `vectors` of 16 bytes. */
template <class T, uint32_t vectors>
struct HeldRow {
  static constexpr uint32_t width = Vector<T>::size;
  float values[vectors][width];

  __device__ void load(const T* x, uint32_t size) {
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      const uint32_t at = (v * blockDim.x + threadIdx.x) * width;
      const Vector<T> vector = at < size ? *reinterpret_cast<const Vector<T>*>(x + at) : Vector<T>{};
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) values[v][k] = at < size ? to_float(vector.values[k]) : 0.0f;
    }
  }

  __device__ float sum() const {
    float total = 0.0f;
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) total += values[v][k];
    }
    return block_reduce<Sum>(total);
  }

  __device__ float sum_of_squares(float shift, uint32_t size) const {
    float total = 0.0f;
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      if ((v * blockDim.x + threadIdx.x) * width >= size) break;
#pragma unroll
      for (uint32_t k = 0; k < width; ++k) total = fmaf(values[v][k] - shift, values[v][k] - shift, total);
    }
    return block_reduce<Sum>(total);
  }

  __device__ void store(T* y, float shift, float scale, const NormArgs& args) const {
#pragma unroll
    for (uint32_t v = 0; v < vectors; ++v) {
      const uint32_t at = (v * blockDim.x + threadIdx.x) * width;
      if (at >= args.size) break;
      Vector<T> vector;
#pragma unroll
      for (uint32_t k = 0; k < width; ++k)
        vector.values[k] = from_float<T>(normed(values[v][k], at + k, shift, scale, args));
      *reinterpret_cast<Vector<T>*>(y + at) = vector;
    }
  }
};

template <class T, uint32_t vectors>
__global__ void norm_vectors_kernel(T* y, const T* x, NormArgs args) {
  const uint64_t begin = static_cast<uint64_t>(blockIdx.x) * args.size;
  HeldRow<T, vectors> row;
  row.load(x + begin, args.size);
  const float size = static_cast<float>(args.size);
  const float mean = args.is_rms ? 0.0f : row.sum() / size;
  const float scale = 1.0f / sqrtf(row.sum_of_squares(mean, args.size) / size + args.epsilon);
  row.store(y + begin, mean, scale, args);
}

template <class T>
__global__ void norm_elements_kernel(T* y, const T* x, NormArgs args) {
  const uint64_t begin = static_cast<uint64_t>(blockIdx.x) * args.size;
  const T* from = x + begin;
  const float size = static_cast<float>(args.size);
  float mean = 0.0f;
  if (!args.is_rms) {
    float total = 0.0f;
    for (uint32_t i = threadIdx.x; i < args.size; i += blockDim.x) total += to_float(from[i]);
    mean = block_reduce<Sum>(total) / size;
  }
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x; i < args.size; i += blockDim.x) {
    const float d = to_float(from[i]) - mean;
    squares = fmaf(d, d, squares);
  }
  const float scale = 1.0f / sqrtf(block_reduce<Sum>(squares) / size + args.epsilon);
  for (uint32_t i = threadIdx.x; i < args.size; i += blockDim.x) {
    y[begin + i] = from_float<T>(normed(to_float(from[i]), i, mean, scale, args));
  }
}

template <class T>
void launch(T* y, const T* x, uint32_t row_count, const NormArgs& args, cudaStream_t stream) {
  constexpr uint32_t width = Vector<T>::size;
  constexpr uint32_t threads_max = 512;
  constexpr uint32_t vectors_max = 8;
  const uint32_t vectors = (args.size + width - 1) / width;
  if (args.size % width != 0 || vectors > threads_max * vectors_max || !is_aligned(x, 16) || !is_aligned(y, 16)) {
    norm_elements_kernel<<<row_count, 256, 0, stream>>>(y, x, args);
    return;
  }
  const uint32_t threads = std::min(threads_max, (vectors + 31) / 32 * 32);
  const uint32_t each = (vectors + threads - 1) / threads;
  if (each == 1) {
    norm_vectors_kernel<T, 1><<<row_count, threads, 0, stream>>>(y, x, args);
  } else if (each == 2) {
    norm_vectors_kernel<T, 2><<<row_count, threads, 0, stream>>>(y, x, args);
  } else if (each <= 4) {
    norm_vectors_kernel<T, 4><<<row_count, threads, 0, stream>>>(y, x, args);
  } else {
    norm_vectors_kernel<T, vectors_max><<<row_count, threads, 0, stream>>>(y, x, args);
  }
}

kvs_status norm(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, const char* name, uint64_t weight,
                uint64_t bias, NormArgs args) {
  return with_device(device, [&](kvs_device& d) {
    check_rows(d, row_count);
    require(args.size > 0 && args.epsilon >= 0.0f, "%s: size must be positive, epsilon not negative", name);
    const uint64_t bytes = d.compute_bytes(row_count, args.size);
    char* to = d.device_memory(y, bytes, "y");
    const char* from = d.device_memory(x, bytes, "x");
    args.weight = d.device_memory<const float>(weight, args.size * sizeof(float), "weight");
    args.bias = bias == 0 ? nullptr : d.device_memory<const float>(bias, args.size * sizeof(float), "bias");
    with_type(d.config.compute_dtype, [&](auto type) {
      using T = decltype(type);
      launch(reinterpret_cast<T*>(to), reinterpret_cast<const T*>(from), row_count, args, d.compute);
    });
    check_launch(name);
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
