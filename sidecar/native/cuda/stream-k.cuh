// A stream-K product, the pipeline that feeds it: a ring of tiles in shared memory, filled by the tensor copy engine. W
// is the tensor cores' 64-wide operand, x the other one.

#pragma once

#include "stream-k-division.cuh"
#include "warp-tensor.cuh"
#include "warpgroup-tensor.cuh"

namespace kvs {

constexpr int stream_k_stages_max = 16;

/** T: of x. N: rows of x, padded. */
template <typename T_, int N_, bool is_fp8_>
struct StreamKShape {
  using T = T_;
  static constexpr int N = N_;
  static constexpr bool is_fp8 = is_fp8_;
  static constexpr int groups = is_fp8 ? 2 : 1;  // warpgroups, of 64 outputs each: one alone converts too slowly
  static constexpr int tile_outputs = groups * 64;
  static constexpr int consumers = groups * 128;  // threads that multiply
  static constexpr int threads = consumers + 32;  // one of one more warp copies
  static constexpr int parts = N / 8;  // float4 that a thread holds of a tile: of eight rows each
  static constexpr int piece_values = 128;
  // A panel is as wide as swizzled rows are: 128 bytes.
  static constexpr int weight_panel_values = is_fp8 ? 128 : 64;
  static constexpr int weight_panels = piece_values / weight_panel_values;
  static constexpr int x_panels = piece_values / 64;
  static constexpr int weight_panel_bytes = tile_outputs * 128;
  static constexpr int x_panel_bytes = N * 128;
  static constexpr int stage_bytes = weight_panels * weight_panel_bytes + x_panels * x_panel_bytes;
  static constexpr int room = 227 * 1024 - 1024 - 512;
  static constexpr int stages = room / stage_bytes < stream_k_stages_max ? room / stage_bytes : stream_k_stages_max;
  static constexpr int shared_bytes = stages * stage_bytes + 1024;
};

struct StreamKMaps {
  CUtensorMap weight;
  CUtensorMap x;
};

/** Addresses in shared memory. */
template <typename Shape>
struct StreamKPipeline {
  uint32_t tiles;
  uint32_t barriers;

  __device__ uint32_t weight(int stage, int panel) const {
    return tiles + stage * Shape::stage_bytes + panel * Shape::weight_panel_bytes;
  }
  __device__ uint32_t x(int stage, int panel) const {
    return weight(stage, Shape::weight_panels) + panel * Shape::x_panel_bytes;
  }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (Shape::stages + stage) * 8; }

  __device__ void init() const {
    for (int stage = 0; stage < Shape::stages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), Shape::consumers / 32);
    }
    make_barriers_visible();
  }
};

/** Which piece comes next, and the stage that it goes through. */
template <int stages>
struct StreamKPosition {
  int tile;
  int piece;  // of K
  int stage = 0;
  uint32_t parity = 0;

  __device__ StreamKPosition(const StreamKParams& p, int at) : tile(at / p.pieces), piece(at - tile * p.pieces) {}
  __device__ void advance(const StreamKParams& p) {
    if (++piece == p.pieces) {
      piece = 0;
      ++tile;
    }
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the copying thread -----------------------------------------------------------------------------------

/** Rows of a box of W: sixteens of outputs, of each the eight that become the lower rows of the tensor cores' sixteen
 * and then the upper ones. The map says which outputs these are. */
template <typename Shape>
__device__ void fetch_weight(const StreamKMaps& maps, const StreamKPipeline<Shape>& pipeline, int stage, int tile,
                             int piece, uint64_t policy) {
  mbarrier_expect(pipeline.full(stage), Shape::stage_bytes);
#pragma unroll
  for (int panel = 0; panel < Shape::weight_panels; ++panel) {
    const int column = piece * Shape::piece_values + panel * Shape::weight_panel_values;
    copy_tile(pipeline.weight(stage, panel), maps.weight, column, 0, 0, tile * (Shape::tile_outputs / 16),
              pipeline.full(stage), policy);
  }
}

template <typename Shape>
__device__ void fetch_x(const StreamKMaps& maps, const StreamKPipeline<Shape>& pipeline, int stage, int piece) {
#pragma unroll
  for (int panel = 0; panel < Shape::x_panels; ++panel) {
    copy_tile(pipeline.x(stage, panel), maps.x, piece * Shape::piece_values + panel * 64, 0, pipeline.full(stage));
  }
}

/** One thread. Weights do not depend on the kernels before: a ring of them is sent for before the wait. They leave the
 * level-2 cache first, or they would push out what blocks leave one another. */
template <typename Shape>
__device__ void produce(const StreamKParams& p, const StreamKMaps& maps, const StreamKPipeline<Shape>& pipeline,
                        int begin, int end) {
  using Position = StreamKPosition<Shape::stages>;
  const int ahead = min(Shape::stages, end - begin);
  const uint64_t policy = read_once_policy();
  Position weight(p, begin);
  for (int i = 0; i < ahead; ++i) {
    fetch_weight<Shape>(maps, pipeline, weight.stage, weight.tile, weight.piece, policy);
    weight.advance(p);
  }
  wait_for_previous_kernels();
  let_next_kernel_start();
  Position now(p, begin);
  for (int i = 0; i < ahead; ++i) {
    fetch_x<Shape>(maps, pipeline, now.stage, now.piece);
    now.advance(p);
  }
  for (int at = begin + ahead; at < end; ++at) {
    mbarrier_wait(pipeline.empty(now.stage), now.parity ^ 1);
    fetch_weight<Shape>(maps, pipeline, now.stage, now.tile, now.piece, policy);
    fetch_x<Shape>(maps, pipeline, now.stage, now.piece);
    now.advance(p);
  }
}

}  // namespace kvs
