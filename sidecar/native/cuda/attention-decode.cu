// Paged decode attention (split over the keys as in flash-decoding; shares as in stream-K): bound by the bytes of K and
// V. Each warp streams tiles of 16 keys through its own ring of shared memory, so that nothing but the end of a segment
// synchronises warps.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention-decode-merge.cuh"
#include "launch.cuh"

namespace kvs {
namespace {

/** Rows of padding get zeros. */
__device__ void clear_padding_rows(const DecodeParams& p) {
  const int row_chunks = p.heads * p.head_dim / 8;
  for (int row = blockIdx.x; row < p.row_count; row += gridDim.x) {
    if (p.step.row_sequence[row] >= 0) continue;
    uint4* to = reinterpret_cast<uint4*>(p.y) + static_cast<uint64_t>(row) * row_chunks;
    for (int i = threadIdx.x; i < row_chunks; i += blockDim.x) to[i] = {0, 0, 0, 0};
  }
}

/** One segment: this warp's tiles, one after the other; each makes room for the tile `stages` behind it. */
template <typename T, int D, int heads_8, typename Shape>
__device__ __forceinline__ void attend_segment(const DecodeParams& p, TileFetcher<Shape, D>& fetcher, uint32_t ring,
                                               int& stage, char* raw, int position, int tile, int tile_end,
                                               const SegmentOutput<Shape>& output, HeadState<T, D, heads_8>& state) {
  const int lane = threadIdx.x % 32;
  TurnedQuery<T, D, heads_8, Shape> query;
  float slope[heads_8][2] = {};
  int block = tile >> p.tiles_per_block_log2;
  if (p.rotary_half > 0) query.load_angles(p, position - block * p.block_tokens);
  query.load(p, raw, output.row, output.head_begin, output.head_count);
  if (p.slopes != nullptr) {
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int head = n * 8 + (lane % 4) * 2 + j;
        if (head < output.head_count) slope[n][j] = p.slopes[output.head_begin + head] * 1.44269504f;
      }
    }
  }
  bool is_turned = false;
  for (; tile < tile_end; ++tile) {
    const int now = tile >> p.tiles_per_block_log2;
    if (!is_turned || (now != block && p.rotary_half > 0)) {
      if (p.rotary_half > 0) query.turn(p, raw, output.head_count);
      query.load_fragments(raw);
      const int next_distance = position - (now + 1) * p.block_tokens;
      if (p.rotary_half > 0 && next_distance >= 0) query.load_angles(p, next_distance);
      is_turned = true;
      block = now;
    }
    const uint32_t at = ring + stage * Shape::stage_bytes;
    copy_async_wait_for(p.stages - 1);
    __syncwarp();
    attend_tile<T, D, heads_8, Shape>(p, at, tile << p.tile_tokens_log2, position, query, slope, state);
    __syncwarp();  // all lanes have read the tile
    if (fetcher.open_next()) fetcher.fetch_next(at);
    copy_async_commit();
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }
}

template <typename Shape>
__device__ __forceinline__ SegmentOutput<Shape> segment_output(const DecodeParams& p, const DecodeSequences& of,
                                                               const DecodeSegment& segment, char* merge,
                                                               float2* states) {
  const int kv_head = segment.unit / p.units_per_group;
  const int part = (segment.unit - kv_head * p.units_per_group) * Shape::heads;
  return {merge, states, kv_head * p.group + part, min(Shape::heads, p.group - part), of.row[segment.sequence]};
}

template <typename T, int D, int heads_8, int warps>
__global__ void __launch_bounds__(warps * 32, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  using Shape = DecodeShape<T, D, heads_8, warps>;
  extern __shared__ __align__(512) char shared[];  // rows of keys: see swizzled()
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  char* rings = shared;
  char* queries = rings + warps * p.stages * Shape::stage_bytes;
  float2* states = reinterpret_cast<float2*>(queries + Shape::query_or_merge_bytes);
  int* facts = reinterpret_cast<int*>(states + warps * Shape::heads);
  const DecodeSequences of{facts + 3 * p.sequence_count, facts, facts + p.sequence_count, facts + 2 * p.sequence_count,
                           facts + 4 * p.sequence_count + 1};

  char* ring_memory = rings + warp * p.stages * Shape::stage_bytes;
  if (p.head_dim < D) {  // columns that are never loaded must not hold NaN
    for (int i = lane; i < p.stages * Shape::stage_bytes / 16; i += 32) reinterpret_cast<uint4*>(ring_memory)[i] = {};
  }
  const int total = scan_sequences<Shape::threads>(p, of) * p.units;
  const DecodeShares shares(total, gridDim.x, warps);
  const int begin = shares.begin(blockIdx.x);
  const int end = shares.begin(blockIdx.x + 1);
  const uint32_t ring = shared_address(ring_memory);
  TileFetcher<Shape, D> fetcher(p, of, begin, end);
  int ahead = 0;
  while (ahead < p.stages && fetcher.open_next() && !fetcher.is_next_tile_fresh()) {
    fetcher.fetch_next(ring + ahead++ * Shape::stage_bytes);
    copy_async_commit();
  }
  wait_for_previous_kernels();
  let_next_kernel_start();
  for (; ahead < p.stages; ++ahead) {
    if (fetcher.open_next()) fetcher.fetch_next(ring + ahead * Shape::stage_bytes);
    copy_async_commit();
  }

  int stage = 0;
  char* raw = queries + warp * 2 * Shape::query_bytes;
  for (int at = begin; at < end;) {
    const DecodeSegment segment = segment_at(p, of.first_tile, at, end);
    const int position = of.position[segment.sequence];
    const int first = visible_tiles(p, position).x + segment.skipped;
    const int tile = first + segment.count * warp / warps;
    const int tile_end = first + segment.count * (warp + 1) / warps;
    const SegmentOutput<Shape> output = segment_output<Shape>(p, of, segment, queries, states);
    HeadState<T, D, heads_8> state;
    state.reset();
    if (tile < tile_end) {
      attend_segment<T, D, heads_8, Shape>(p, fetcher, ring, stage, raw, position, tile, tile_end, output, state);
    }
    __syncthreads();  // no warp needs its query any longer
    write_warp_state<T, D, heads_8, Shape>(output, state, tile == tile_end);
    __syncthreads();
    const int slot = blockIdx.x * 2 + (segment.skipped == 0 ? 1 : 0);
    merge_warps<T, D, Shape>(p, output, segment.is_whole(), slot);
    at += segment.count;
    if (at < end) __syncthreads();  // queries come where the states were
  }
  copy_async_wait<0>();
  clear_padding_rows(p);
  if (begin == end) return;
  const DecodeSegment segment = segment_at(p, of.first_tile, begin, end);
  if (segment.is_closing()) {
    const SegmentOutput<Shape> output = segment_output<Shape>(p, of, segment, queries, states);
    close_pair<T, D, Shape>(p, output, shares.owner(segment.pair_begin));
  }
}

// ---- launcher --------------------------------------------------------------------------------------

/** As many warps as fit, halved until they do. */
template <typename T, int D, int heads_8, int warps>
cudaError_t launch_decode(DecodeParams& p, const AttentionArgs& args) {
  using Shape = DecodeShape<T, D, heads_8, warps>;
  const int limit = shared_bytes_per_block(args.compute_capability);
  p.stages = 8;
  while (p.stages > 2 && Shape::shared_bytes(p.stages, p.sequence_count) > limit) --p.stages;
  const int bytes = Shape::shared_bytes(p.stages, p.sequence_count);
  if (bytes > limit) {
    if constexpr (warps > (D == 64 ? 4 : 2)) return launch_decode<T, D, heads_8, warps / 2>(p, args);
    return cudaErrorNotSupported;
  }
  return launch(decode_kernel<T, D, heads_8, warps>, args.sm_count, Shape::threads, bytes, args.stream, p);
}

template <typename T, int D>
cudaError_t launch_heads(DecodeParams& p, const AttentionArgs& args) {
  const int padded = p.group <= 8 ? 8 : 16;
  p.units_per_group = (p.group + padded - 1) / padded;
  p.units = static_cast<int>(args.kv_heads) * p.units_per_group;
  if (padded == 8) return launch_decode<T, D, 1, D == 256 ? 4 : 8>(p, args);
  return launch_decode<T, D, 2, D == 256 ? 2 : 4>(p, args);
}

template <typename T>
cudaError_t launch_head_dim(DecodeParams& p, const AttentionArgs& args) {
  switch (padded_head_dim(args.head_dim)) {
    case 64:
      return launch_heads<T, 64>(p, args);
    case 128:
      return launch_heads<T, 128>(p, args);
    default:
      return launch_heads<T, 256>(p, args);
  }
}

int log2_of(int power) {
  int log = 0;
  while ((1 << log) < power) ++log;
  return log;
}

}  // namespace

cudaError_t decode_attention(const AttentionArgs& args, const AttentionLayout& layout) {
  DecodeParams p = {};
  p.y = args.y;
  p.q = args.q;
  p.kv = args.kv;
  p.block_stride_bytes = args.block_stride_bytes;
  p.head_stride_bytes = args.block_tokens * args.head_dim * 2;
  p.value_bytes = args.kv_heads * p.head_stride_bytes;
  p.cosine = args.rope_cosine;
  p.sine = args.rope_sine;
  p.slopes = args.alibi_slopes;
  p.scale_log2 = args.scale * 1.44269504f;
  p.window = static_cast<int>(args.window);
  p.heads = static_cast<int>(args.heads);
  p.group = static_cast<int>(args.heads / args.kv_heads);
  p.head_dim = static_cast<int>(args.head_dim);
  p.rotary_half = static_cast<int>(args.rotary_dim / 2);
  p.block_tokens = static_cast<int>(args.block_tokens);
  p.tile_tokens = p.block_tokens < decode_tile_tokens ? p.block_tokens : decode_tile_tokens;
  p.tile_tokens_log2 = log2_of(p.tile_tokens);
  p.tiles_per_block_log2 = log2_of(p.block_tokens / p.tile_tokens);
  p.row_count = static_cast<int>(args.row_count);
  p.sequence_count = static_cast<int>(args.sequence_count);
  if (args.is_decode && p.sequence_count > p.row_count) p.sequence_count = p.row_count;
  p.is_decode = args.is_decode;
  p.step = args.step;
  char* workspace = static_cast<char*>(args.workspace);
  p.states = reinterpret_cast<float2*>(workspace + layout.decode_states);
  p.partials = reinterpret_cast<float*>(workspace + layout.decode_partials);
  return args.compute_dtype == KVS_BF16 ? launch_head_dim<__nv_bfloat16>(p, args) : launch_head_dim<__half>(p, args);
}

}  // namespace kvs
