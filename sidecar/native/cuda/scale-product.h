// What an FP8 product without scales leaves to do: each of its sums times the scale of its row and of its output.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kvasir.h"

namespace kvs {

struct ScaleProductArgs {
  void* y;                     // (rows, outputs) of y_dtype
  const void* sums;            // (rows, outputs) of sums_dtype, 16-byte aligned; may be y itself
  const float* row_scales;     // (rows)
  const float* output_scales;  // (outputs)
  const float* bias;           // (outputs) or null
  kvs_dtype y_dtype;           // F32, F16 or BF16
  kvs_dtype sums_dtype;        // BF16, or F32 where y is F32
  uint32_t rows;
  uint32_t outputs;
  bool is_accumulating;  // y += instead of y =; not with sums in y
};

/** y = [y +] sums * row_scales * output_scales [+ bias]. */
void scale_product(const ScaleProductArgs& args, cudaStream_t stream);

}  // namespace kvs
