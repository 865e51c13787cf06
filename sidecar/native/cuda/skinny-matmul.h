// Matrix products of few rows, bound by the bytes of the weights: y (rows, outputs) = x (rows, inputs) weight^T + bias,
// with the gate behind it where the caller has one.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kvasir.h"

namespace kvs {

struct SkinnyProduct {
  void* y;                 // (rows, outputs) of y_dtype
  const void* x;           // (rows, inputs) of x_dtype, 16-byte aligned
  const void* weight;      // (outputs, inputs) row-major of weight_dtype, 256-byte aligned, rows without padding;
                           // F8E4M3 in the order of fp8-order.h
  const float* scales;     // (outputs) F32, F8E4M3 weights only: value = scale[output] * stored
  const float* bias;       // (outputs) F32 or null
  kvs_dtype y_dtype;       // x_dtype or F32
  kvs_dtype x_dtype;       // F16 or BF16
  kvs_dtype weight_dtype;  // x_dtype or F8E4M3
  uint32_t rows;
  uint32_t outputs;
  uint32_t inputs;
  bool is_accumulating;  // y += instead of y =; F32
  void* gated;  // (rows, outputs / 2) of x_dtype: silu(first half of y) * second half, in place of y, which is not
                // written; null: not wanted. Not x's memory: thread blocks do not wait for one another
};

/** What the products of a device share. */
struct SkinnyDevice {
  /** Device memory of skinny_workspace_bytes(), 256-byte aligned. All zero when the device opens and between launches
   * nobody else writes to it, so counters that a kernel leaves at zero stay there. */
  void* workspace;
  /** The same of stream_k_workspace_bytes(). */
  void* stream_k_workspace;
  int sm_count;
  int compute_capability;
};

/** Of x: more are left to the library. */
inline constexpr uint32_t skinny_rows_max = 16;
uint64_t skinny_workspace_bytes();

/** Whether the kernels serve these types and sizes, and beat the library's product at them. */
bool skinny_supports(const SkinnyProduct& product, const SkinnyDevice& device);
/** Enqueues; returns the launch's error. Sums in F32, in an order that the sizes, the gate and the GPU decide. */
cudaError_t skinny_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream);

}  // namespace kvs
