// Matrix products of up to 64 rows on Hopper, still bound by the bytes of the weights: what the skinny ones do, on
// wgmma and the tensor copy engine, divided as stream-K divides products (Osama et al. 2023).

#pragma once

#include "skinny-matmul.h"

namespace kvs {

inline constexpr uint32_t stream_k_rows_max = 64;
/** Device memory for the sums that thread blocks leave one another: all zero before the first product and after each.
 * 0: on this GPU there is no such product. */
uint64_t stream_k_workspace_bytes(int sm_count, int compute_capability);

/** Whether the kernel serves these types and sizes. The library's product is no faster there, but for 64 rows on an
 * H200 by half a percent of a step. */
bool stream_k_supports(const SkinnyProduct& product, const SkinnyDevice& device);
/** Enqueues; returns the launch's error. Sums in F32, in an order that the sizes, the gate and the GPU decide. */
cudaError_t stream_k_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream);

}  // namespace kvs
