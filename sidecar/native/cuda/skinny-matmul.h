// Matrix products of few rows, bound by the bytes of the weights: y (rows, outputs) = x (rows, inputs) weight^T +
// bias.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kvasir.h"

namespace kvs {

struct SkinnyMatmulArgs {
  void* y;                 // (rows, outputs) of y_dtype
  const void* x;           // (rows, inputs) of x_dtype, 16-byte aligned
  const void* weight;      // (outputs, inputs) row-major of weight_dtype, 256-byte aligned, rows without padding
  const float* scales;     // (outputs) F32, F8E4M3 weights only: value = scale[output] * stored
  const float* bias;       // (outputs) F32 or null
  kvs_dtype y_dtype;       // x_dtype or F32
  kvs_dtype x_dtype;       // F16 or BF16
  kvs_dtype weight_dtype;  // x_dtype or F8E4M3
  uint32_t rows;
  uint32_t outputs;
  uint32_t inputs;
  bool is_accumulating;  // y += instead of y =

  /** Device memory of skinny_matmul_workspace_bytes(), 256-byte aligned. All zero when the device opens and between
   * launches nobody else writes to it, so counters that a kernel leaves at zero stay there. */
  void* workspace;
  uint64_t workspace_bytes;
  int sm_count;
  int compute_capability;
  cudaStream_t stream;
};

/** Of x: more are left to the library. */
inline constexpr uint32_t skinny_rows_max = 16;

uint64_t skinny_matmul_workspace_bytes(int sm_count);

/** Whether the kernels serve these types and sizes, and beat the library's product at them. */
bool skinny_matmul_supports(const SkinnyMatmulArgs& args);

/** Enqueues on args.stream; returns the launch's error. Sums in F32. */
cudaError_t skinny_matmul(const SkinnyMatmulArgs& args);

}  // namespace kvs
