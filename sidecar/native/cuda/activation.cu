// kvs_silu_mul and kvs_gelu: element by element, 16 bytes a thread where sizes allow.

#include <algorithm>

#include "device.h"
#include "dtype.h"
#include "launch.cuh"
#include "warp-tensor.cuh"

namespace kvs {

namespace {

constexpr uint32_t threads = 256;

struct SiluMul {
  static constexpr uint32_t inputs = 2;
  static constexpr bool is_gate = true;  // a product's kernel can do it
  /** For results of 16 bits by the fast instructions, whose errors of 1e-6 they do not show. */
  template <class T>
  __device__ static float apply(float gate, float up) {
    if constexpr (sizeof(T) == 2) return __fdividef(gate, 1.0f + __expf(-gate)) * up;
    return gate / (1.0f + expf(-gate)) * up;
  }
};

struct Gelu {
  static constexpr uint32_t inputs = 1;
  static constexpr bool is_gate = false;
  template <class T>
  __device__ static float apply(float x, float) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};

/** y (rows, size) of x (rows, inputs * size); Element is T or Vector<T>, size in Elements. */
template <class Activation, class Element, class T>
__global__ void activation_kernel(T* y, const T* x, uint32_t size) {
  constexpr uint32_t width = sizeof(Element) / sizeof(T);
  let_next_kernel_start();  // it waits for this one, which waits for the one before
  wait_for_previous_kernels();
  const uint32_t i = blockIdx.x * threads + threadIdx.x;
  if (i >= size) return;
  const uint64_t row = blockIdx.y;
  const Element* from = reinterpret_cast<const Element*>(x) + row * Activation::inputs * size + i;
  const Element a = from[0];
  const Element b = Activation::inputs == 2 ? from[size] : a;
  Element out;
#pragma unroll
  for (uint32_t k = 0; k < width; ++k) {
    const float first = to_float(reinterpret_cast<const T*>(&a)[k]);
    const float second = to_float(reinterpret_cast<const T*>(&b)[k]);
    const float value = Activation::template apply<T>(first, second);
    reinterpret_cast<T*>(&out)[k] = from_float<T>(value);
  }
  reinterpret_cast<Element*>(y)[row * size + i] = out;
}

template <class Activation, class T>
void launch_activation(T* y, const T* x, uint32_t row_count, uint32_t size, cudaStream_t stream, const char* name) {
  constexpr uint32_t rows_max = 65535;  // of a grid
  const bool has_vectors = size % Vector<T>::size == 0 && is_aligned(x, 16) && is_aligned(y, 16);
  const uint32_t elements = has_vectors ? size / Vector<T>::size : size;
  const auto kernel = has_vectors ? activation_kernel<Activation, Vector<T>, T> : activation_kernel<Activation, T, T>;
  for (uint32_t row = 0; row < row_count; row += rows_max) {
    const dim3 grid((elements + threads - 1) / threads, std::min(rows_max, row_count - row));
    T* to = y + static_cast<uint64_t>(row) * size;
    const T* from = x + static_cast<uint64_t>(row) * Activation::inputs * size;
    check_cuda(launch(kernel, grid, threads, 0, stream, to, from, elements), name);
  }
}

template <class Activation>
kvs_status activate(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size, const char* name) {
  return with_device(device, [&](kvs_device& d) {
    check_rows(d, row_count);
    require(size > 0, "%s: size must be positive", name);
    char* to = d.device_memory(y, d.compute_bytes(row_count, size), "y");
    const char* from =
        d.device_memory(x, d.compute_bytes(row_count, static_cast<uint64_t>(Activation::inputs) * size), "x");
    if (Activation::is_gate && d.add_gate(to, from, row_count, size)) return;
    with_type(d.config.compute_dtype, [&](auto type) {
      using T = decltype(type);
      launch_activation<Activation>(reinterpret_cast<T*>(to), reinterpret_cast<const T*>(from), row_count, size,
                                    d.compute_stream(), name);
    });
  });
}

}  // namespace
}  // namespace kvs

extern "C" {

kvs_status kvs_silu_mul(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size) {
  return kvs::activate<kvs::SiluMul>(device, y, x, row_count, size, "kvs_silu_mul");
}

kvs_status kvs_gelu(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size) {
  return kvs::activate<kvs::Gelu>(device, y, x, row_count, size, "kvs_gelu");
}

}  // extern "C"
