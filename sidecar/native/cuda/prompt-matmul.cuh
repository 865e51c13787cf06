// A prompt's product, the pipeline that feeds it: a ring of tiles of x and W in shared memory, filled by the tensor
// copy engine. The blocks of a cluster have different rows of x and the same of W: each fetches its share of W for all.

#pragma once

#include "cluster.cuh"
#include "prompt-schedule.cuh"
#include "ring-position.cuh"
#include "warp-tensor.cuh"
#include "warpgroup-tensor.cuh"

namespace kvs {

template <typename T_, int cluster_>
struct PromptShape {
  using T = T_;
  static constexpr int cluster = cluster_;
  static constexpr int groups = 2;  // warpgroups that multiply, of 64 rows each
  static constexpr int threads = (1 + groups) * 128;
  static constexpr int piece_values = 64;  // of K: a swizzled row of 128 bytes
  static constexpr int x_bytes = prompt_tile_rows * 128;
  static constexpr int weight_bytes = prompt_tile_outputs * 128;
  static constexpr int stage_bytes = x_bytes + weight_bytes;
  static constexpr int stages = 4;
  static constexpr int box_outputs = prompt_tile_outputs / 2 / cluster;  // a block's share of half a tile
  static constexpr int box_bytes = box_outputs * 128;
  static constexpr int staged_bytes = 16 * prompt_tile_outputs / 2 * 2;  // of a warp's 16 rows, on their way out
  static constexpr int shared_bytes = stages * stage_bytes + groups * 4 * staged_bytes + 1024;
};

struct PromptMaps {
  CUtensorMap weight;
  CUtensorMap x;
};

struct PromptParams {
  void* gated;
  const float* bias;
  int rows;
  int outputs;
  int pieces;  // of K
  PromptSchedule schedule;
};

/** Addresses in shared memory. */
template <typename Shape>
struct PromptPipeline {
  uint32_t tiles;
  uint32_t barriers;

  __device__ uint32_t x(int stage) const { return tiles + stage * Shape::stage_bytes; }
  __device__ uint32_t weight(int stage) const { return x(stage) + Shape::x_bytes; }
  __device__ uint32_t staged(int warp) const { return x(Shape::stages) + warp * Shape::staged_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (Shape::stages + stage) * 8; }

  /** A stage is empty when the warps of all blocks have read theirs: any block's copies go to all. */
  __device__ void init() const {
    for (int stage = 0; stage < Shape::stages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), Shape::cluster * Shape::groups * 4);
    }
    make_barriers_visible();
  }
};

__device__ __forceinline__ int first_row_of(const PromptUnit& unit, int cluster, int rank) {
  return (unit.row_tile * cluster + rank) * prompt_tile_rows;
}

// ---- the copying thread -----------------------------------------------------------------------------------

/** All pieces of all units of the cluster, one after the other. */
template <typename Shape>
class PromptWalk {
 public:
  __device__ explicit PromptWalk(const PromptParams& p)
      : p_(p), index_(blockIdx.x / Shape::cluster), unit_(p.schedule.unit(index_)) {}

  __device__ bool is_over() const { return index_ >= p_.schedule.units; }
  __device__ const PromptUnit& unit() const { return unit_; }
  __device__ int column() const { return piece_ * Shape::piece_values; }
  __device__ int stage() const { return position_.at; }
  __device__ uint32_t parity() const { return position_.parity; }

  __device__ void advance() {
    position_.advance();
    if (++piece_ < p_.pieces) return;
    piece_ = 0;
    index_ += gridDim.x / Shape::cluster;
    if (!is_over()) unit_ = p_.schedule.unit(index_);
  }

 private:
  const PromptParams& p_;
  int index_;
  PromptUnit unit_;
  int piece_ = 0;
  RingPosition<Shape::stages> position_;
};

/** Whatever the cluster's blocks send counts at the barrier of this one, its rows of x included. Should theirs come
 * first, the count is below zero until this one expects them: the phase cannot end before. */
template <typename Shape>
__device__ void fetch_weight(const PromptMaps& maps, const PromptPipeline<Shape>& pipeline,
                             const PromptWalk<Shape>& walk, int rank) {
  const int boxes = walk.unit().is_half ? 1 : 2;  // of this block
  const uint32_t full = pipeline.full(walk.stage());
  mbarrier_expect(full, Shape::x_bytes + boxes * Shape::cluster * Shape::box_bytes);
  for (int i = 0; i < boxes; ++i) {
    const int box = rank * boxes + i;
    const uint32_t to = pipeline.weight(walk.stage()) + box * Shape::box_bytes;
    const int sixteen = walk.unit().output / 16 + box * (Shape::box_outputs / 16);
    if constexpr (Shape::cluster > 1) {
      constexpr uint16_t all = (1 << Shape::cluster) - 1;
      copy_tile_to_all(to, maps.weight, walk.column(), 0, 0, sixteen, full, all);
    } else {
      copy_tile(to, maps.weight, walk.column(), 0, 0, sixteen, full);
    }
  }
}

template <typename Shape>
__device__ void fetch_x(const PromptMaps& maps, const PromptPipeline<Shape>& pipeline, const PromptWalk<Shape>& walk,
                        int rank) {
  copy_tile(pipeline.x(walk.stage()), maps.x, walk.column(), first_row_of(walk.unit(), Shape::cluster, rank),
            pipeline.full(walk.stage()));
}

/** One thread. Weights do not depend on the kernels before: a ring of them is sent for before the wait. */
template <typename Shape>
__device__ void produce(const PromptParams& p, const PromptMaps& maps, const PromptPipeline<Shape>& pipeline) {
  const int rank = static_cast<int>(cluster_rank());
  PromptWalk<Shape> ahead(p);
  int sent = 0;
  for (; sent < Shape::stages && !ahead.is_over(); ++sent) {
    fetch_weight<Shape>(maps, pipeline, ahead, rank);
    ahead.advance();
  }
  wait_for_previous_kernels();
  let_next_kernel_start();
  PromptWalk<Shape> now(p);
  for (; sent > 0; --sent) {
    fetch_x<Shape>(maps, pipeline, now, rank);
    now.advance();
  }
  for (; !now.is_over(); now.advance()) {
    mbarrier_wait(pipeline.empty(now.stage()), now.parity() ^ 1);
    fetch_weight<Shape>(maps, pipeline, now, rank);
    fetch_x<Shape>(maps, pipeline, now, rank);
  }
}

}  // namespace kvs
