// Matrix products of many rows on Hopper, bound by the tensor cores: y (rows, outputs) = x (rows, inputs) weight^T +
// bias, or silu(first half) * second half of that, which then takes no kernel and no memory of its own.

#pragma once

#include "skinny-matmul.h"

namespace kvs {

/** Fewer are stream-K products. */
inline constexpr uint32_t prompt_rows_min = 65;

/** How a product is cut; what a bench varies. */
struct PromptTuning {
  int cluster = 0;         // thread blocks that share each tile of W, 1, 2 or 4; 0: as seems fastest
  int group_rows = 2048;   // of x that run side by side, see PromptSchedule
  bool is_halving = true;  // tiles of the last round, where that fills it
  bool has_turns = true;   // a block's warpgroups finish tiles one after the other, so that one of them multiplies
};

/** Whether the kernels serve these types and sizes. x, y and gated 16-byte aligned; outputs a multiple of 16, inputs of
 * 8. Of a gated product `gated` alone is written. */
bool prompt_matmul_supports(const SkinnyProduct& product, const SkinnyDevice& device);
/** The share of the multiprocessors' time that goes into products within the matrix: low with few tiles. */
double prompt_matmul_use(const SkinnyProduct& product, const SkinnyDevice& device, const PromptTuning& tuning = {});
/** Enqueues; returns the launch's error. Sums in F32, in an order that the sizes alone decide. */
cudaError_t prompt_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream,
                          const PromptTuning& tuning = {});

}  // namespace kvs
