// kvs_embed and kvs_gather_logit_rows: rows copied by index.

#include <type_traits>

#include "device.h"
#include "dtype.h"
#include "fp8-order.h"
#include "launch.cuh"
#include "warp-tensor.cuh"

namespace kvs {

namespace {

constexpr uint32_t threads = 256;

/** One block a row. Padding computes garbage, of a token that exists. */
template <class W>
__global__ void embed_kernel(float* y, const W* weight, const float* scales, DeviceStep step, const int32_t* tokens,
                             uint32_t token_stride, uint32_t cols) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const uint32_t row = blockIdx.x;
  const int32_t sequence = step.row_sequence[row];
  uint64_t token = 0;
  if (sequence >= 0) {
    const uint64_t slot = static_cast<uint64_t>(step.sequences[sequence].slot);
    token = static_cast<uint64_t>(tokens[slot * token_stride + step.row_position[row]]);
  }
  constexpr bool is_fp8 = std::is_same_v<W, __nv_fp8_e4m3>;
  const W* from = weight + token * (is_fp8 ? fp8_row_bytes(cols) : cols);
  float* to = y + static_cast<uint64_t>(row) * cols;
  const float scale = scales == nullptr ? 1.0f : scales[token];
  for (uint32_t col = threadIdx.x; col < cols; col += threads) {
    to[col] = scale * to_float(from[is_fp8 ? fp8_place(col) : col]);
  }
}

__global__ void gather_kernel(float* y, const float* x, const int32_t* logit_row, uint32_t size) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const float* from = x + static_cast<uint64_t>(logit_row[blockIdx.x]) * size;
  float* to = y + static_cast<uint64_t>(blockIdx.x) * size;
  for (uint32_t i = threadIdx.x; i < size; i += threads) to[i] = from[i];
}

}  // namespace
}  // namespace kvs

using kvs::require;
using kvs::with_device;

extern "C" {

kvs_status kvs_embed(kvs_device* device, uint64_t y, kvs_weight* weight, uint32_t row_count) {
  return with_device(device, [&](kvs_device& d) {
    kvs::check_step_rows(d, row_count);
    const kvs_weight& w = d.known(weight);
    require(w.rows == d.config.vocab_size && w.cols == d.config.hidden_size,
            "embed: the weight is (%u, %u), not (vocab_size, hidden_size)", w.rows, w.cols);
    float* to = d.device_memory<float>(y, kvs::f32_bytes(row_count, w.cols), "y");
    kvs::with_stored_type(w.dtype, [&](auto w_type) {
      using W = decltype(w_type);
      const cudaError_t error = kvs::launch(kvs::embed_kernel<W>, row_count, kvs::threads, 0, d.compute_stream(), to,
                                            w.memory.as<const W>(), w.scales.as<const float>(), d.step.arrays(),
                                            d.tokens.as<const int32_t>(), d.token_stride(), w.cols);
      kvs::check_cuda(error, "kvs_embed");
    });
  });
}

kvs_status kvs_gather_logit_rows(kvs_device* device, uint64_t y, uint64_t x, uint32_t logit_count, uint32_t size) {
  return with_device(device, [&](kvs_device& d) {
    require(size > 0 && logit_count > 0 && logit_count == d.facts.logit_count,
            "gather: %u logit rows, but the step that has begun has %u", logit_count, d.facts.logit_count);
    float* to = d.device_memory<float>(y, kvs::f32_bytes(logit_count, size), "y");
    const float* from = d.device_memory<const float>(x, kvs::f32_bytes(d.facts.row_count, size), "x");
    const cudaError_t error = kvs::launch(kvs::gather_kernel, logit_count, kvs::threads, 0, d.compute_stream(), to,
                                          from, d.step.arrays().logit_row, size);
    kvs::check_cuda(error, "kvs_gather_logit_rows");
  });
}

}  // extern "C"
