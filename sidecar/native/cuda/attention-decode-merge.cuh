// Decode attention, the end of a segment: the warps' softmaxes become one, and, where several thread blocks share a
// pair, the last of them adds up what all of them left in the workspace.

#pragma once

#include "attention-decode-warp.cuh"

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
      *reinterpret_cast<float4*>(p.partials + (static_cast<uint64_t>(slot) * Shape::heads + head) * D + dim) = total;
      if (dim == 0) p.states[slot * Shape::heads + head] = state;
    }
  }
}

/** The last block of a pair adds up all of its partials, in the order of the blocks. */
template <typename T, int D, typename Shape>
__device__ void finish_pair(const DecodeParams& p, const SegmentOutput<Shape>& output, const DecodeSegment& segment,
                            const DecodeShares& shares) {
  __shared__ int is_last;
  const int first = shares.owner(segment.pair_begin);
  const int count = shares.owner(segment.pair_begin + segment.pair_tiles - 1) - first + 1;
  int* counter = p.counters + segment.sequence * p.units + segment.unit;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(counter, 1) == count - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const auto slot_of = [&](int i) { return (first + i) * 2 + (i == 0 ? 1 : 0); };
  float2* gathered = reinterpret_cast<float2*>(output.merge);
  for (int i = threadIdx.x; i < count * output.head_count; i += Shape::threads) {
    gathered[i] = __ldcg(p.states + slot_of(i / output.head_count) * Shape::heads + i % output.head_count);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < output.head_count * (D / 4); i += Shape::threads) {
    const int head = i / (D / 4);
    const int dim = i % (D / 4) * 4;
    float4 total = {0, 0, 0, 0};
    const float* from = p.partials + static_cast<uint64_t>(head) * D + dim;
    const float2 state = merge_states(
        count, [&](int c) { return gathered[c * output.head_count + head]; },
        [&](int c, float factor) {
          const float* partial = from + static_cast<uint64_t>(slot_of(c)) * Shape::heads * D;
          add_scaled(total, __ldcg(reinterpret_cast<const float4*>(partial)), factor);
        });
    store_output<T>(p, output.row, output.head_begin + head, dim, total, state.y);
  }
  if (threadIdx.x == 0) *counter = 0;
}

}  // namespace kvs
