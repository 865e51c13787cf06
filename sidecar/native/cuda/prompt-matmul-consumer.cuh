// A prompt's product, the arithmetic: each of two warpgroups multiplies 64 rows of x by all outputs of the unit.

#pragma once

#include "prompt-matmul-result.cuh"

namespace kvs {

/** One lane for each block of the cluster tells for its warp. */
template <typename Shape>
__device__ __forceinline__ void release_stage(const PromptPipeline<Shape>& pipeline, int stage) {
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (Shape::cluster > 1) {
    if (lane < Shape::cluster) mbarrier_arrive_at(pipeline.empty(stage), lane);
  } else {
    if (lane == 0) mbarrier_arrive(pipeline.empty(stage));
  }
}

/** Products of one piece run while those of the next are issued. */
template <typename Shape, int outputs>
__device__ __forceinline__ void multiply_pieces(const PromptParams& p, const PromptPipeline<Shape>& pipeline, int group,
                                                RingPosition<Shape::stages>& now, PromptSums<outputs>& sums) {
  int running = 0;  // stage of the products that may still run
  for (int piece = 0; piece < p.pieces; ++piece) {
    const uint32_t x = pipeline.x(now.at) + group * 64 * 128;
    const uint32_t weight = pipeline.weight(now.at);
    mbarrier_wait(pipeline.full(now.at), now.parity);
    products_begin();
#pragma unroll
    for (int k = 0; k < Shape::piece_values / 16; ++k) {
      multiply_shared<typename Shape::T>(sums, tile_descriptor(x + k * 32, 16), tile_descriptor(weight + k * 32, 16),
                                         piece > 0 || k > 0);
    }
    products_commit();
    products_wait<1>();
    if (piece > 0) release_stage<Shape>(pipeline, running);
    running = now.at;
    now.advance();
  }
  products_wait<0>();
  keep_in_place(sums);
  release_stage<Shape>(pipeline, running);
}

/** Of rows that are not there: W is fetched for the cluster's other block all the same. */
template <typename Shape>
__device__ __forceinline__ void skip_pieces(const PromptParams& p, const PromptPipeline<Shape>& pipeline,
                                            RingPosition<Shape::stages>& now) {
  for (int piece = 0; piece < p.pieces; ++piece) {
    mbarrier_wait(pipeline.full(now.at), now.parity);
    __syncwarp();
    release_stage<Shape>(pipeline, now.at);
    now.advance();
  }
}

/** Rows that are not there have a path of their own: where paths meet before the results, the compiler moves sums from
 * register to register and waits for each product (C7515). */
template <typename Shape, int outputs>
__device__ __forceinline__ void consume_unit(const PromptParams& p, const PromptPipeline<Shape>& pipeline,
                                             const PromptUnit& unit, int group, RingPosition<Shape::stages>& now,
                                             PromptSums<outputs>& sums) {
  const int rank = static_cast<int>(cluster_rank());
  const int first_row = first_row_of(unit, Shape::cluster, rank) + group * 64;
  if (first_row >= p.rows) {
    skip_pieces<Shape>(p, pipeline, now);
    return;
  }
  multiply_pieces<Shape, outputs>(p, pipeline, group, now, sums);
  store_gated<Shape, outputs>(p, unit.output, PromptStaging<Shape>(p, pipeline, first_row), sums);
}

/** A warpgroup, over all units of its cluster. Whole tiles and halves have their sums in the same registers: the first
 * products overwrite them, but to the compiler they live on from unit to unit. */
template <typename Shape>
__device__ __forceinline__ void consume(const PromptParams& p, const PromptPipeline<Shape>& pipeline) {
  const int group = __shfl_sync(full_warp, threadIdx.x / 128, 0) - 1;  // the compiler sees that warps agree
  RingPosition<Shape::stages> now;
  PromptSums<prompt_tile_outputs> sums;
  auto& half_sums = reinterpret_cast<PromptSums<prompt_tile_outputs / 2>&>(sums);
  for (int index = blockIdx.x / Shape::cluster; index < p.schedule.units; index += gridDim.x / Shape::cluster) {
    const PromptUnit unit = p.schedule.unit(index);
    if (unit.is_half) {
      consume_unit<Shape, prompt_tile_outputs / 2>(p, pipeline, unit, group, now, half_sums);
    } else {
      consume_unit<Shape, prompt_tile_outputs>(p, pipeline, unit, group, now, sums);
    }
  }
}

}  // namespace kvs
