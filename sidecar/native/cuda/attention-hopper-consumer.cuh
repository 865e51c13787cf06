// Prefill attention for Hopper, the arithmetic: a warpgroup holds 64 rows of q. The softmax of one key tile runs beside
// the second product of the tile before; between the two warpgroups, turns at the tensor cores alternate.

#pragma once

#include "attention-hopper.cuh"
#include "attention-query.cuh"

namespace kvs {

/** Turns at the tensor cores: a warpgroup issues its products, then lets the other one issue. */
__device__ __forceinline__ void take_turn(int group) { named_sync(4 + group, consumers * group_threads); }
__device__ __forceinline__ void pass_turn(int group) { named_arrive(4 + (group ^ 1), consumers * group_threads); }
__device__ __forceinline__ void group_sync(int group) { named_sync(1 + group, group_threads); }

/** 16 bytes of a swizzled tile of 128 rows. */
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return chunk / 8 * panel_bytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

template <typename Shape>
struct GroupState {
  float out[Shape::out_values];
  float max[2];  // rows lane / 4 and lane / 4 + 8 of the warp's 16
  float sum[2];
};

template <typename Shape>
__device__ __forceinline__ void multiply_keys(uint32_t query, uint32_t keys, float (&score)[64]) {
  products_begin();
#pragma unroll
  for (int k = 0; k < Shape::D / 16; ++k) {
    const uint32_t at = k / 4 * panel_bytes + k % 4 * 32;
    multiply_shared<typename Shape::T>(score, tile_descriptor(query + at, 16), tile_descriptor(keys + at, 16), k > 0);
  }
  products_commit();
}

template <typename Shape>
__device__ __forceinline__ void multiply_values(const uint32_t (&weight)[8][4], uint32_t values,
                                                float (&out)[Shape::out_values]) {
  products_begin();
#pragma unroll
  for (int k = 0; k < key_block / 16; ++k) {
    multiply_registers<typename Shape::T>(out, weight[k], tile_descriptor(values + k * 2048, panel_bytes));
  }
  products_commit();
}

/** ALiBi, causal and window bounds; rows are 8 apart. */
__device__ __forceinline__ void mask_scores(const PrefillParams& p, const PrefillItem& item, int first_row,
                                            int first_key, float (&score)[64]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = first_row + j * 8;
    const int token = p.token_of(row);
    const int to_first_key = first_key + threadIdx.x % 4 * 2 - item.tile.first_position - token;
    if (p.slopes != nullptr) {
      const float slope = p.slopes[item.head_begin + row - token * p.packed_heads] * 1.44269504f / p.scale_log2;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          score[n * 4 + j * 2 + i] += slope * static_cast<float>(to_first_key + n * 8 + i);
        }
      }
    }
    const int lowest = p.window > 0 ? -p.window : INT32_MIN;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int distance = to_first_key + n * 8 + i;
        if (distance > 0 || distance <= lowest) score[n * 4 + j * 2 + i] = -INFINITY;
      }
    }
  }
}

/** Scores become weights; factor: what the sums and outputs so far shrink by. */
template <typename Shape>
__device__ __forceinline__ void softmax(float (&score)[64], GroupState<Shape>& state, float scale_log2,
                                        float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float most = state.max[j];
#pragma unroll
    for (int n = 0; n < 16; ++n) most = fmaxf(most, fmaxf(score[n * 4 + j * 2], score[n * 4 + j * 2 + 1]));
    most = fmaxf(most, __shfl_xor_sync(full_warp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(full_warp, most, 2));
    const float shift = most == -INFINITY ? 0.0f : most * scale_log2;
    factor[j] = exp2_fast(state.max[j] * scale_log2 - shift);
    state.max[j] = most;
    float added = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = score[n * 4 + j * 2 + i];
        value = exp2_fast(value * scale_log2 - shift);
        added += value;
      }
    }
    state.sum[j] = state.sum[j] * factor[j] + added;
  }
}

template <typename Shape>
__device__ __forceinline__ void pack_weights(const float (&score)[64], uint32_t (&weight)[8][4]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weight[k][i] = pack_pair<typename Shape::T>(score[k * 8 + i * 2], score[k * 8 + i * 2 + 1]);
  }
}

template <typename Shape>
__device__ __forceinline__ void scale_output(GroupState<Shape>& state, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < Shape::out_values; ++i) state.out[i] *= factor[i / 2 % 2];
}

/** Which key tiles of an item no mask touches: (low, high). */
struct PlainTiles {
  int low;
  int high;

  __device__ PlainTiles(const PrefillParams& p, const PrefillItem& item) {
    high = (item.tile.first_position + 1) / key_block;  // tiles below hold no later key than the first row's
    const int last = item.tile.first_position + item.tile.tokens - 1;
    low = p.window > 0 ? max(0, last - p.window + key_block) / key_block : 0;
    if (p.slopes != nullptr) high = 0;
  }
  __device__ bool has(int block) const { return block >= low && block < high; }
};

/** The warpgroup's 64 rows of q, turned, into shared memory. */
template <typename Shape>
__device__ void load_query(const PrefillParams& p, const PrefillItem& item, const Pipeline& pipeline,
                           char* shared_query, int group) {
  constexpr int row_pairs = Shape::D / 16;
  constexpr int row_step = group_threads / row_pairs;
  const int first = group * group_rows + threadIdx.x % group_threads / row_pairs;
#pragma unroll 1
  for (int row = first; row < (group + 1) * group_rows; row += 2 * row_step) {
    load_queries<typename Shape::T, 2, row_step>(
        p, item, row, threadIdx.x % row_pairs, [&](int to, int chunk, const uint4& values) {
          *reinterpret_cast<uint4*>(shared_query + swizzled(to, chunk)) = values;
        });
  }
  fence_async_proxy();
  group_sync(group);
}

/** Until the values of `block` are there; those behind the sequence's last position were never written: zeros. */
template <typename Shape>
__device__ __forceinline__ void wait_for_values(const PrefillParams& p, const PrefillItem& item,
                                                const Pipeline& pipeline, const RingPosition<stages>& stage, int block,
                                                int group) {
  mbarrier_wait(pipeline.values_full(stage.at), stage.parity);
  const int valid = item.tile.context - block * key_block;
  if (p.values != nullptr || valid >= key_block) return;
  const uint32_t values = pipeline.values + stage.at * Shape::tile_bytes;
  for (int i = threadIdx.x % group_threads; i < (key_block - valid) * Shape::D / 8; i += group_threads) {
    const uint32_t at = values + swizzled(valid + i / (Shape::D / 8), i % (Shape::D / 8));
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
  }
  fence_async_proxy();
  group_sync(group);
}

/** All key tiles of one item. */
template <typename Shape>
__device__ __forceinline__ void attend_item(const PrefillParams& p, const PrefillItem& item, const Pipeline& pipeline,
                                            int group, RingPosition<stages>& key_stage,
                                            RingPosition<stages>& value_stage, GroupState<Shape>& state) {
  const int lane = threadIdx.x % 32;
  const bool is_speaker = lane == 0;  // counts for its warp
  const int first_row = group * group_rows + threadIdx.x % group_threads / 32 * 16 + lane / 4;
  const uint32_t query = pipeline.query + group * group_rows * 128;
  const PlainTiles plain(p, item);
  float score[64];
  uint32_t weight[8][4];
  float factor[2];
  state.max[0] = state.max[1] = -INFINITY;
  state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::out_values; ++i) state.out[i] = 0.0f;

  int block = item.tile.block_end - 1;
  mbarrier_wait(pipeline.keys_full(key_stage.at), key_stage.parity);
  take_turn(group);
  multiply_keys<Shape>(query, pipeline.keys + key_stage.at * Shape::tile_bytes, score);
  pass_turn(group);
  products_wait<0>();
  keep_in_place(score);
  if (is_speaker) mbarrier_arrive(pipeline.keys_empty(key_stage.at));
  key_stage.advance();
  if (!plain.has(block)) mask_scores(p, item, first_row, block * key_block, score);
  softmax<Shape>(score, state, p.scale_log2, factor);
  pack_weights<Shape>(score, weight);

  for (--block; block >= item.tile.block_begin; --block) {
    mbarrier_wait(pipeline.keys_full(key_stage.at), key_stage.parity);
    take_turn(group);
    multiply_keys<Shape>(query, pipeline.keys + key_stage.at * Shape::tile_bytes, score);
    wait_for_values<Shape>(p, item, pipeline, value_stage, block + 1, group);
    multiply_values<Shape>(weight, pipeline.values + value_stage.at * Shape::tile_bytes, state.out);
    pass_turn(group);
    products_wait<1>();
    keep_in_place(score);
    if (is_speaker) mbarrier_arrive(pipeline.keys_empty(key_stage.at));
    key_stage.advance();
    if (!plain.has(block)) mask_scores(p, item, first_row, block * key_block, score);
    softmax<Shape>(score, state, p.scale_log2, factor);
    products_wait<0>();
    keep_in_place(state.out);
    keep_in_place(weight);
    if (is_speaker) mbarrier_arrive(pipeline.values_empty(value_stage.at));
    value_stage.advance();
    scale_output<Shape>(state, factor);
    pack_weights<Shape>(score, weight);
  }
  wait_for_values<Shape>(p, item, pipeline, value_stage, item.tile.block_begin, group);
  multiply_values<Shape>(weight, pipeline.values + value_stage.at * Shape::tile_bytes, state.out);
  products_wait<0>();
  keep_in_place(state.out);
  if (is_speaker) mbarrier_arrive(pipeline.values_empty(value_stage.at));
  value_stage.advance();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    state.sum[j] += __shfl_xor_sync(full_warp, state.sum[j], 1);
    state.sum[j] += __shfl_xor_sync(full_warp, state.sum[j], 2);
  }
}

/** The warp's 16 finished rows, through their place in the query buffer, so that stores are 16 bytes wide. */
template <typename Shape>
__device__ void store_rows(const PrefillParams& p, const PrefillItem& item, char* shared_query, int warp_row,
                           const GroupState<Shape>& state) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = warp_row + j * 8 + lane / 4;
    const float inverse = 1.0f / state.sum[j];
#pragma unroll
    for (int n = 0; n < Shape::D / 8; ++n) {
      *reinterpret_cast<uint32_t*>(shared_query + swizzled(row, n) + lane % 4 * 4) =
          pack_pair<T>(state.out[n * 4 + j * 2] * inverse, state.out[n * 4 + j * 2 + 1] * inverse);
    }
  }
  __syncwarp();
  constexpr int row_chunks = Shape::D / 8;
  const int chunk = lane % row_chunks;
#pragma unroll
  for (int i = 0; i < 16; i += 32 / row_chunks) {
    const int row = warp_row + i + lane / row_chunks;
    const int token = p.token_of(row);
    if (token >= item.tile.tokens || chunk * 8 >= p.head_dim) continue;
    T* to = static_cast<T*>(p.y) + row_offset(p, item, token, row - token * p.packed_heads) + chunk * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(shared_query + swizzled(row, chunk));
  }
}

template <typename Shape>
__device__ void store_part(const PrefillParams& p, const PrefillItem& item, int warp_row,
                           const GroupState<Shape>& state) {
  const int lane = threadIdx.x % 32;
  const int64_t slot = static_cast<int64_t>(item.tile_index) * p.units() + item.unit;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int64_t at = slot * tile_rows + warp_row + j * 8 + lane / 4;
    if (lane % 4 == 0) {
      p.states[at] = {state.max[j] == -INFINITY ? -INFINITY : state.max[j] * p.scale_log2, state.sum[j]};
    }
    float* to = p.partials + at * Shape::D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Shape::D / 8; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = {state.out[n * 4 + j * 2], state.out[n * 4 + j * 2 + 1]};
    }
  }
}

template <typename Shape>
__device__ void consume(const PrefillParams& p, const Pipeline& pipeline, char* shared_query) {
  const int group = __shfl_sync(full_warp, threadIdx.x / group_threads, 0) - 1;  // the compiler sees that warps agree
  const int warp_row = threadIdx.x / 32 * 16 - group_rows * consumers / 2;
  RingPosition<item_slots> slot;
  RingPosition<stages> key_stage;
  RingPosition<stages> value_stage;
  const int tile_count = p.plan->tile_count;
  if (group == 1) pass_turn(group);
  while (true) {
    mbarrier_wait(pipeline.item_full(slot.at), slot.parity);
    const int next = pipeline.items[slot.at];
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(pipeline.item_empty(slot.at));
    slot.advance();
    if (next < 0) break;
    const PrefillItem item = prefill_item(p, next, tile_count);
    GroupState<Shape> state;
    group_sync(group);  // the query buffer is free
    load_query<Shape>(p, item, pipeline, shared_query, group);
    attend_item<Shape>(p, item, pipeline, group, key_stage, value_stage, state);
    if (item.tile.splits == 1) {
      group_sync(group);  // all warps have read their queries
      store_rows<Shape>(p, item, shared_query, warp_row, state);
    } else {
      store_part<Shape>(p, item, warp_row, state);
    }
  }
  if (group == 0) take_turn(group);  // the turn that nobody takes
}

}  // namespace kvs
