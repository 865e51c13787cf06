// Prefill attention for Hopper, the pipeline: shared memory and its barriers, and the warp that takes items of the plan
// and fetches their keys and values with the tensor copy engine.

#pragma once

#include "attention-prefill.cuh"
#include "ring-position.cuh"
#include "warpgroup-tensor.cuh"

namespace kvs {

constexpr int group_threads = 128;
constexpr int consumers = 2;
constexpr int threads = (1 + consumers) * group_threads;
constexpr int tile_rows = 128;
constexpr int group_rows = tile_rows / consumers;
constexpr int stages = 2;
constexpr int panel_bytes = 128 * 128;  // 128 rows of 64 values, swizzled
constexpr int item_slots = 2;

template <typename T_, int D_>
struct HopperShape {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int panels = D / 64;
  static constexpr int tile_bytes = panels * panel_bytes;
  static constexpr int shared_bytes = (1 + 2 * stages) * tile_bytes + 1024;
  static constexpr int out_values = D / 2;  // of a lane
};

struct Maps {
  CUtensorMap keys;
  CUtensorMap values;
};

/** Addresses in shared memory. */
struct Pipeline {
  uint32_t query;
  uint32_t keys;
  uint32_t values;
  uint32_t barriers;
  int* items;  // item_slots of them, -1: the end

  __device__ uint32_t keys_full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t keys_empty(int stage) const { return barriers + (stages + stage) * 8; }
  __device__ uint32_t values_full(int stage) const { return barriers + (2 * stages + stage) * 8; }
  __device__ uint32_t values_empty(int stage) const { return barriers + (3 * stages + stage) * 8; }
  __device__ uint32_t item_full(int slot) const { return barriers + (4 * stages + slot) * 8; }
  __device__ uint32_t item_empty(int slot) const { return barriers + (4 * stages + item_slots + slot) * 8; }
};
constexpr int barrier_count = 4 * stages + 2 * item_slots;

// ---- producer -------------------------------------------------------------------------------------------

/** One thread: 128 gathered rows. */
template <typename Shape>
__device__ void fetch_gathered(const CUtensorMap& map, uint32_t to, int row, uint32_t full) {
#pragma unroll
  for (int panel = 0; panel < Shape::panels; ++panel) copy_tile(to + panel * panel_bytes, map, panel * 64, row, full);
}

/** A lane's piece of the 128 values of a key block, where it lies. Pieces that no row sees may be in no block: the
 * nearest that is seen comes instead, so that what weight zero multiplies is finite. */
struct ValuePiece {
  int id;   // of the KV block
  int row;  // in it

  __device__ ValuePiece(const PrefillParams& p, const PrefillItem& item, int block) {
    const int rows = min(p.block_tokens, key_block);
    const int piece = threadIdx.x % 32;
    const int last = item.tile.first_position + item.tile.tokens - 1;
    const int first = p.window > 0 ? max(0, item.tile.first_position + 1 - p.window) : 0;
    const int key = max(min(block * key_block + piece * rows, last & -rows), first & -rows);
    id = p.step.block_table[item.tile.table_begin + (key >> p.block_tokens_log2)];
    row = key & (p.block_tokens - 1);
  }

  template <typename Shape>
  __device__ void fetch(const PrefillParams& p, const CUtensorMap& map, int kv_head, uint32_t to, uint32_t full) const {
    const int rows = min(p.block_tokens, key_block);
    const int piece = threadIdx.x % 32;
    if (piece * rows >= key_block) return;
#pragma unroll
    for (int panel = 0; panel < Shape::panels; ++panel) {
      copy_tile(to + panel * panel_bytes + piece * rows * 128, map, panel * 64, row, kv_head, id, full);
    }
  }
};

/** One warp: takes items, fetches their key tiles from the last to the first, keys one tile ahead of values. */
template <typename Shape>
__device__ void produce(const PrefillParams& p, const Maps& maps, const Pipeline& pipeline) {
  const bool is_leader = threadIdx.x == 0;
  RingPosition<item_slots> slot;
  RingPosition<stages> key_stage;
  RingPosition<stages> value_stage;
  const int tile_count = p.plan->tile_count;
  while (true) {
    int next = is_leader ? atomicAdd(&p.plan->next_item, 1) : 0;
    next = __shfl_sync(full_warp, next, 0);
    const bool is_end = next >= tile_count * p.units();
    mbarrier_wait(pipeline.item_empty(slot.at), slot.parity ^ 1);
    if (is_leader) {
      pipeline.items[slot.at] = is_end ? -1 : next;
      mbarrier_arrive(pipeline.item_full(slot.at));
    }
    slot.advance();
    if (is_end) return;
    const PrefillItem item = prefill_item(p, next, tile_count);
    const int row = item.kv_head * p.key_capacity + item.tile.key_shift;
    for (int block = item.tile.block_end - 1; block >= item.tile.block_begin - 1; --block) {
      if (block >= item.tile.block_begin) {
        mbarrier_wait(pipeline.keys_empty(key_stage.at), key_stage.parity ^ 1);
        if (is_leader) {
          mbarrier_expect(pipeline.keys_full(key_stage.at), Shape::tile_bytes);
          fetch_gathered<Shape>(maps.keys, pipeline.keys + key_stage.at * Shape::tile_bytes, row + block * key_block,
                                pipeline.keys_full(key_stage.at));
        }
        key_stage.advance();
      }
      if (block + 1 < item.tile.block_end) {
        const uint32_t to = pipeline.values + value_stage.at * Shape::tile_bytes;
        const uint32_t full = pipeline.values_full(value_stage.at);
        const ValuePiece piece(p, item, block + 1);  // its number is on the way while the warp waits
        mbarrier_wait(pipeline.values_empty(value_stage.at), value_stage.parity ^ 1);
        if (is_leader) mbarrier_expect(full, Shape::tile_bytes);
        __syncwarp();
        if (p.values == nullptr) {
          piece.fetch<Shape>(p, maps.values, p.kv_head_begin + item.kv_head, to, full);
        } else if (is_leader) {
          fetch_gathered<Shape>(maps.values, to, row + (block + 1) * key_block, full);
        }
        value_stage.advance();
      }
    }
  }
}

}  // namespace kvs
