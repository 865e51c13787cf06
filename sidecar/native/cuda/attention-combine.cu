// The last kernel of prefill attention, when tiles may have been split over their keys: adds up the parts of each row,
// in order, as in flash-decoding.

#include "attention-prefill.cuh"
#include "launch.cuh"

namespace kvs {
namespace {

constexpr int threads = 256;
constexpr int row_groups = 4;  // of a tile, each of a thread block
constexpr int wide = 4;        // chunks of a thread, and parts of each, that are on their way at once
constexpr int deep = 4;

/** Output so far, relative to exp2(most). */
struct Sum {
  float most = -INFINITY;
  float sum = 0.0f;
  float4 total = {0, 0, 0, 0};

  __device__ void add(const float2& state, const float4& part) {
    const float now = fmaxf(most, state.x);
    const float shift = now == -INFINITY ? 0.0f : now;
    const float before = exp2_fast(most - shift);
    const float factor = exp2_fast(state.x - shift);
    most = now;
    sum = sum * before + state.y * factor;
    total = {total.x * before + part.x * factor, total.y * before + part.y * factor, total.z * before + part.z * factor,
             total.w * before + part.w * factor};
  }
};

/** Rows [row_begin, row_end) of an item whose tile is the first of its parts. */
template <typename T, int D, int rows>
__device__ void combine_rows(const PrefillParams& p, const PrefillItem& item, int row_begin, int row_end) {
  constexpr int row_chunks = D / 4;
  const int64_t slot_rows = static_cast<int64_t>(p.units()) * rows;
  const int64_t first = (static_cast<int64_t>(item.tile_index) * p.units() + item.unit) * rows;
  for (int begin = row_begin * row_chunks + threadIdx.x; begin < row_end * row_chunks; begin += threads * wide) {
    Sum sums[wide];
    for (int split = 0; split < item.tile.splits; split += deep) {
      float2 state[wide][deep];
      float4 part[wide][deep];
#pragma unroll
      for (int w = 0; w < wide; ++w) {
        const int at = begin + w * threads;
#pragma unroll
        for (int s = 0; s < deep; ++s) {
          state[w][s] = {-INFINITY, 0};
          part[w][s] = {0, 0, 0, 0};
          if (at >= row_end * row_chunks || split + s >= item.tile.splits) continue;
          const int64_t row = first + (split + s) * slot_rows + at / row_chunks;
          state[w][s] = p.states[row];
          part[w][s] = reinterpret_cast<const float4*>(p.partials + row * D)[at % row_chunks];
        }
      }
#pragma unroll
      for (int w = 0; w < wide; ++w) {
#pragma unroll
        for (int s = 0; s < deep; ++s) sums[w].add(state[w][s], part[w][s]);
      }
    }
#pragma unroll
    for (int w = 0; w < wide; ++w) {
      const int at = begin + w * threads;
      const int row = at / row_chunks;
      const int dim = at % row_chunks * 4;
      const int token = p.token_of(row);
      if (at >= row_end * row_chunks || token >= item.tile.tokens || dim >= p.head_dim) continue;
      const float4& total = sums[w].total;
      const float inverse = 1.0f / sums[w].sum;
      T* to = static_cast<T*>(p.y) + row_offset(p, item, token, row - token * p.packed_heads) + dim;
      *reinterpret_cast<uint2*>(to) = {pack_pair<T>(total.x * inverse, total.y * inverse),
                                       pack_pair<T>(total.z * inverse, total.w * inverse)};
    }
  }
}

template <typename T, int D, int rows>
__global__ void __launch_bounds__(threads) combine_kernel(const __grid_constant__ PrefillParams p) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int tile_count = p.plan->tile_count;
  for (int i = blockIdx.x; i < tile_count * p.units() * row_groups; i += gridDim.x) {
    PrefillItem item;
    item.tile_index = i / (p.units() * row_groups);
    item.tile = p.plan->tiles[item.tile_index];
    if (item.tile.splits == 1 || item.tile.split > 0) continue;
    place_unit(p, item, i / row_groups % p.units());
    const int row_begin = i % row_groups * (rows / row_groups);
    combine_rows<T, D, rows>(p, item, row_begin, row_begin + rows / row_groups);
  }
}

template <typename T>
cudaError_t launch_combine(const PrefillParams& p, int padded_dim, cudaStream_t stream) {
  const int grid = p.sm_count * 4;
  if (padded_dim == 64) return launch(combine_kernel<T, 64, 128>, grid, threads, 0, stream, p);
  if (padded_dim == 128) return launch(combine_kernel<T, 128, 128>, grid, threads, 0, stream, p);
  return launch(combine_kernel<T, 256, 64>, grid, threads, 0, stream, p);
}

}  // namespace

cudaError_t combine_parts(const PrefillParams& p, kvs_dtype dtype, int padded_dim, cudaStream_t stream) {
  return dtype == KVS_BF16 ? launch_combine<__nv_bfloat16>(p, padded_dim, stream)
                           : launch_combine<__half>(p, padded_dim, stream);
}

}  // namespace kvs
