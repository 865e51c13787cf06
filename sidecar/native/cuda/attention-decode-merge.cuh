// Decode attention, the end of a segment: the warps' softmaxes become one. Where several thread blocks share a pair,
// each leaves its part in the workspace, and the last block adds them up when it has done all else. Flags, a fence and
// two more round trips to memory, would be half of a short kernel's time. The block that waits has the highest number
// of those that it waits for, so that they run already.

#pragma once

#include "attention-decode-warp.cuh"
#include "unflagged-part.cuh"

namespace kvs {

/** What the end of a segment needs. */
template <typename Shape>
struct SegmentOutput {
  char* merge;     // F32 (warp, head, merge_pitch)
  float2* states;  // (warp, head): max, sum
  int head_begin;
  int head_count;
  int row;
};

template <typename T, int D, int heads_8, typename Shape>
__device__ void write_warp_state(const SegmentOutput<Shape>& output, HeadState<T, D, heads_8>& state, bool is_empty) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* out = reinterpret_cast<float*>(output.merge) + warp * Shape::heads * Shape::merge_pitch;
  state.add_up_sums();
#pragma unroll
  for (int n = 0; n < heads_8; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int head = n * 8 + (lane % 4) * 2 + j;
      if (lane < 4) output.states[warp * Shape::heads + head] = {state.max[n][j], state.sum[n][j]};
      if (is_empty || head >= output.head_count) continue;
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        out[head * Shape::merge_pitch + d * 16 + lane / 4] = state.out[n][d][j];
        out[head * Shape::merge_pitch + d * 16 + lane / 4 + 8] = state.out[n][d][2 + j];
      }
    }
  }
}

template <typename T>
__device__ void store_output(const DecodeParams& p, int row, int head, int dim, float4 value, float sum) {
  if (dim >= p.head_dim) return;
  const float inverse = 1.0f / sum;
  char* to = static_cast<char*>(p.y) + ((static_cast<uint64_t>(row) * p.heads + head) * p.head_dim + dim) * 2;
  *reinterpret_cast<uint2*>(to) = {pack_pair<T>(value.x * inverse, value.y * inverse),
                                   pack_pair<T>(value.z * inverse, value.w * inverse)};
}

/** Adds up `count` states of one head in order: get(i) is (max, sum), add(i, factor) adds the i-th output. */
template <typename Get, typename Add>
__device__ __forceinline__ float2 merge_states(int count, Get get, Add add) {
  float most = -INFINITY;
  for (int i = 0; i < count; ++i) most = fmaxf(most, get(i).x);
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 state = get(i);
    if (state.x == -INFINITY) continue;
    const float factor = exp2_fast(state.x - most);
    sum += state.y * factor;
    add(i, factor);
  }
  return {most, sum};
}

__device__ __forceinline__ void add_scaled(float4& to, const float4& value, float factor) {
  to.x += value.x * factor;
  to.y += value.y * factor;
  to.z += value.z * factor;
  to.w += value.w * factor;
}

/** The warps' states become the row's output, or, when other blocks share the pair, this block's partial. */
template <typename T, int D, typename Shape>
__device__ void merge_warps(const DecodeParams& p, const SegmentOutput<Shape>& output, bool is_whole, int slot) {
  for (int i = threadIdx.x; i < output.head_count * (D / 4); i += Shape::threads) {
    const int head = i / (D / 4);
    const int dim = i % (D / 4) * 4;
    float4 total = {0, 0, 0, 0};
    const float* from = reinterpret_cast<const float*>(output.merge) + head * Shape::merge_pitch + dim;
    const float2 state = merge_states(
        Shape::warps, [&](int w) { return output.states[w * Shape::heads + head]; },
        [&](int w, float factor) {
          add_scaled(total, *reinterpret_cast<const float4*>(from + w * Shape::heads * Shape::merge_pitch), factor);
        });
    if (is_whole) {
      store_output<T>(p, output.row, output.head_begin + head, dim, total, state.y);
    } else {
      leave_part(p.partials + (static_cast<int64_t>(slot) * Shape::heads + head) * D + dim, total);
      if (dim == 0) leave_part(p.states + slot * Shape::heads + head, state);
    }
  }
}

/** A part of one head and four dims, as another block leaves it. */
struct DecodePart {
  const float2* state_at;
  float4* values_at;
  float2 state;
  float4 values;

  __device__ void look() {
    state = look_at_part(state_at);
    values = look_at_part(values_at);
  }
  __device__ bool is_whole() const { return is_there(state) && is_there(values); }
};

/** Waits for `count` parts: all that are missing are on their way at once. */
template <int batch>
__device__ __forceinline__ void wait_for_parts(DecodePart (&parts)[batch], int count) {
  bool is_missing = true;
  while (is_missing) {
    is_missing = false;
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (i >= count || parts[i].is_whole()) continue;
      parts[i].look();
      is_missing = true;
    }
  }
}

/** Adds up the parts of one head and four dims, in the order of the blocks. slot_of(i): where the i-th lies. */
template <int D, typename Shape, typename Slot>
__device__ float4 add_up_parts(const DecodeParams& p, int head, int dim, int count, Slot slot_of, float& sum) {
  constexpr int batch = 18;
  float most = -INFINITY;
  float4 total = {0, 0, 0, 0};
  sum = 0.0f;
  for (int begin = 0; begin < count; begin += batch) {
    DecodePart parts[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      parts[i].state = {0, 0};
      const int64_t at = static_cast<int64_t>(slot_of(begin + i)) * Shape::heads + head;
      parts[i].state_at = p.states + at;
      parts[i].values_at = reinterpret_cast<float4*>(p.partials + at * D + dim);
    }
    wait_for_parts(parts, count - begin);
    const float before = most;
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (begin + i < count) most = fmaxf(most, parts[i].state.x);
    }
    const float factor = exp2_fast(before - most);
    total = {total.x * factor, total.y * factor, total.z * factor, total.w * factor};
    sum *= factor;
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (begin + i >= count) continue;
      *parts[i].values_at = {0, 0, 0, 0};
      const float weight = exp2_fast(parts[i].state.x - most);
      sum += parts[i].state.y * weight;
      add_scaled(total, parts[i].values, weight);
    }
  }
  return total;
}

/** The row's output from all blocks' parts of the pair. */
template <typename T, int D, typename Shape>
__device__ void close_pair(const DecodeParams& p, const SegmentOutput<Shape>& output, int first_block) {
  const int count = static_cast<int>(blockIdx.x) - first_block + 1;
  const auto slot_of = [&](int i) { return (first_block + i) * 2 + (i == 0 ? 1 : 0); };
  for (int i = threadIdx.x; i < output.head_count * (D / 4); i += Shape::threads) {
    const int head = i / (D / 4);
    const int dim = i % (D / 4) * 4;
    float sum;
    const float4 total = add_up_parts<D, Shape>(p, head, dim, count, slot_of, sum);
    store_output<T>(p, output.row, output.head_begin + head, dim, total, sum);
  }
  __syncthreads();  // all have read the states
  for (int i = threadIdx.x; i < count * output.head_count; i += Shape::threads) {
    p.states[slot_of(i / output.head_count) * Shape::heads + i % output.head_count] = {0, 0};
  }
}

}  // namespace kvs
