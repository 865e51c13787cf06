// The first kernel of prefill attention: plans the tiles, and gathers one layer's keys and values out of the blocks
// into dense rows, each key turned by the base position of its block. Bound by the bytes: read once, written once.

#include "attention-prefill.cuh"
#include "launch.cuh"

namespace kvs {
namespace {

constexpr int threads = 256;
constexpr int chunk_keys = 64;  // of an item of work: so many keys and values of one head

/** Exclusive prefix sum over the threads of the block; total: over all. */
__device__ int block_scan(int value, int& total) {
  __shared__ int warp_sums[threads / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(full_warp, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  total = 0;
  for (int w = 0; w < threads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before;
}

/** What prefill does with one sequence of the step. */
struct SequenceWork {
  int rows;  // 0: not of this pass
  int tiles;
  int first_position;
  int key_begin;  // multiples of key_block
  int key_end;

  __device__ SequenceWork(const PrefillParams& p, int sequence) {
    rows = tiles = key_begin = key_end = first_position = 0;
    if (sequence >= p.step.counts->sequence_count) return;
    const kvs_step_sequence facts = p.step.sequences[sequence];
    if (facts.row_count < 2) return;
    rows = facts.row_count;
    tiles = (rows + p.tile_tokens - 1) / p.tile_tokens;
    first_position = p.step.row_position[facts.row_begin];
    const int first_key = p.window > 0 ? max(0, first_position + 1 - p.window) : 0;
    key_begin = first_key / key_block * key_block;
    key_end = (first_position + rows + key_block - 1) / key_block * key_block;
  }

  __device__ int first_block(const PrefillParams& p, int tile) const {
    const int position = first_position + tile * p.tile_tokens;
    return p.window > 0 ? max(0, position + 1 - p.window) / key_block : 0;
  }
  __device__ int end_block(const PrefillParams& p, int tile) const {
    const int last = first_position + min(rows, (tile + 1) * p.tile_tokens) - 1;
    return last / key_block + 1;
  }
};

/** Keys and tiles before each sequence of the pass, in shared memory; one more at the end. */
struct SequenceOffsets {
  int* keys;
  int* tiles;
};

__device__ void scan_sequences(const PrefillParams& p, const SequenceOffsets& offsets) {
  const int count = p.sequence_end - p.sequence_begin;
  const int per_thread = (count + threads - 1) / threads;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, count);
  const int end = min(begin + per_thread, count);
  int keys = 0;
  int tiles = 0;
  for (int s = begin; s < end; ++s) {
    const SequenceWork work(p, p.sequence_begin + s);
    offsets.keys[s] = keys;
    offsets.tiles[s] = tiles;
    keys += work.key_end - work.key_begin;
    tiles += work.tiles;
  }
  int total_keys;
  int total_tiles;
  const int keys_before = block_scan(keys, total_keys);
  const int tiles_before = block_scan(tiles, total_tiles);
  for (int s = begin; s < end; ++s) {
    offsets.keys[s] += keys_before;
    offsets.tiles[s] += tiles_before;
  }
  if (threadIdx.x == 0) {
    offsets.keys[count] = total_keys;
    offsets.tiles[count] = total_tiles;
  }
  __syncthreads();
}

/** Index of the last entry of prefix[0, count) that is at most `value`. */
__device__ int find_owner(const int* prefix, int count, int value) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (prefix[middle] <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// ---- the plan ---------------------------------------------------------------------------------------

/** Key blocks of all tiles and units, when they are so few that tiles are split to fill the GPU; else 0. */
__device__ int blocks_to_split(const PrefillParams& p, const SequenceOffsets& offsets, int tile_count) {
  const int count = p.sequence_end - p.sequence_begin;
  if (tile_count * p.units() >= 2 * p.sm_count) return 0;
  int blocks = 0;
  for (int t = threadIdx.x; t < tile_count; t += threads) {
    const int s = find_owner(offsets.tiles, count, t);
    const SequenceWork work(p, p.sequence_begin + s);
    const int tile = work.tiles - 1 - (t - offsets.tiles[s]);
    blocks += work.end_block(p, tile) - work.first_block(p, tile);
  }
  int total;
  block_scan(blocks, total);
  return total * p.units();
}

/** Parts of a tile of so many key blocks: its share of the SMs, so that all parts run at once; three blocks at least.
 */
__device__ int parts_of(const PrefillParams& p, int blocks, int blocks_of_all) {
  if (blocks_of_all == 0) return 1;
  return max(1, min(blocks / 3, static_cast<int>(static_cast<int64_t>(blocks) * p.sm_count / blocks_of_all)));
}

/** Tiles in order of falling length within a sequence, each in as many parts as it needs. */
__device__ void write_plan(const PrefillParams& p, const SequenceOffsets& offsets) {
  const int count = p.sequence_end - p.sequence_begin;
  const int tile_count = offsets.tiles[count];
  const int blocks_of_all = blocks_to_split(p, offsets, tile_count);
  int written = 0;
  for (int begin = 0; begin < tile_count; begin += threads) {
    const int t = begin + threadIdx.x;
    PrefillTile tile = {};
    int first = 0;
    int end = 0;
    if (t < tile_count) {
      const int s = find_owner(offsets.tiles, count, t);
      const SequenceWork work(p, p.sequence_begin + s);
      const int index = work.tiles - 1 - (t - offsets.tiles[s]);
      first = work.first_block(p, index);
      end = work.end_block(p, index);
      tile.row_begin = p.step.sequences[p.sequence_begin + s].row_begin + index * p.tile_tokens;
      tile.tokens = min(p.tile_tokens, work.rows - index * p.tile_tokens);
      tile.first_position = work.first_position + index * p.tile_tokens;
      tile.key_shift = offsets.keys[s] - work.key_begin;
      tile.splits = parts_of(p, end - first, blocks_of_all);
      tile.context = work.first_position + work.rows;
      tile.table_begin = p.step.sequences[p.sequence_begin + s].table_begin;
    }
    int total;
    int at = written + block_scan(tile.splits, total);
    for (tile.split = 0; tile.split < tile.splits; ++tile.split) {
      tile.block_begin = first + (end - first) * tile.split / tile.splits;
      tile.block_end = first + (end - first) * (tile.split + 1) / tile.splits;
      p.plan->tiles[at++] = tile;
    }
    written += total;
  }
  if (threadIdx.x == 0) {
    p.plan->tile_count = written;
    p.plan->next_item = 0;
  }
}

// ---- the keys and values ------------------------------------------------------------------------------

/** Gathers 64 keys and values of one head; a warp holds whole rows, a lane 8 values of each. */
template <typename T, int D, bool with_values>
__device__ void gather_chunk(const PrefillParams& p, const SequenceWork& work, int table_begin, int key_begin,
                             uint64_t row_to, int kv_head) {
  constexpr int row_chunks = D / 8;
  constexpr int rows_each = threads / row_chunks;
  constexpr int steps = chunk_keys / rows_each;
  const int chunk = threadIdx.x % row_chunks;
  const int row = threadIdx.x / row_chunks;
  const int32_t* table = p.step.block_table + table_begin;
  const int context = work.first_position + work.rows;
  const char* head = p.kv + static_cast<uint64_t>(p.kv_head_begin + kv_head) * p.head_stride_bytes;
  uint4 keys[steps];
  uint4 values[with_values ? steps : 1];
#pragma unroll
  for (int i = 0; i < steps; ++i) {
    const int key = key_begin + row + i * rows_each;
    const int id = key < context ? table[key >> p.block_tokens_log2] : -1;
    keys[i] = {0, 0, 0, 0};
    if (with_values) values[i] = {0, 0, 0, 0};
    if (id >= 0 && chunk * 8 < p.head_dim) {
      const char* from = head + static_cast<uint64_t>(id) * p.block_stride_bytes +
                         (key & (p.block_tokens - 1)) * p.head_dim * 2 + chunk * 16;
      keys[i] = *reinterpret_cast<const uint4*>(from);
      if (with_values) values[i] = *reinterpret_cast<const uint4*>(from + p.value_bytes);
    }
  }
  const ChunkTurn turn(chunk, p.rotary_half);
  const int lane = threadIdx.x % 32;
  const int partner_lane = turn.is_turned ? lane - chunk + turn.partner : lane;
  const uint64_t head_to = static_cast<uint64_t>(kv_head) * p.key_capacity;
#pragma unroll
  for (int i = 0; i < steps; ++i) {
    const int key = key_begin + row + i * rows_each;
    if (p.rotary_half > 0) {
      uint4 partner;
      partner.x = __shfl_sync(full_warp, keys[i].x, partner_lane);
      partner.y = __shfl_sync(full_warp, keys[i].y, partner_lane);
      partner.z = __shfl_sync(full_warp, keys[i].z, partner_lane);
      partner.w = __shfl_sync(full_warp, keys[i].w, partner_lane);
      const int64_t at = static_cast<int64_t>(key & -p.block_tokens) * p.rotary_half + turn.pair;
      if (turn.is_turned && key < context) {
        keys[i] = turn_chunk<T>(keys[i], partner, Angles(p.cosine + at, p.sine + at), turn.is_low);
      }
    }
    const uint64_t to = (head_to + row_to + row + i * rows_each) * row_chunks + chunk;
    static_cast<uint4*>(p.keys)[to] = keys[i];
    if (with_values) static_cast<uint4*>(p.values)[to] = values[i];
  }
}

__device__ void clear_padding_rows(const PrefillParams& p) {
  const int row_chunks = p.heads * p.head_dim / 8;
  for (int row = blockIdx.x; row < p.row_count; row += gridDim.x) {
    if (p.step.row_sequence[row] >= 0) continue;
    uint4* to = static_cast<uint4*>(p.y) + static_cast<uint64_t>(row) * row_chunks;
    for (int i = threadIdx.x; i < row_chunks; i += threads) to[i] = {0, 0, 0, 0};
  }
}

template <typename T, int D, bool with_values>
__global__ void __launch_bounds__(threads) gather_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ int shared[];
  const int count = p.sequence_end - p.sequence_begin;
  const SequenceOffsets offsets{shared, shared + count + 1};
  wait_for_previous_kernels();
  let_next_kernel_start();
  scan_sequences(p, offsets);
  if (blockIdx.x == gridDim.x - 1) write_plan(p, offsets);
  if (p.sequence_begin == 0 && p.kv_head_begin == 0) clear_padding_rows(p);
  const int heads = p.kv_head_end - p.kv_head_begin;
  const int items = offsets.keys[count] / chunk_keys * heads;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int row_to = item / heads * chunk_keys;
    const int s = find_owner(offsets.keys, count, row_to);
    const SequenceWork work(p, p.sequence_begin + s);
    gather_chunk<T, D, with_values>(p, work, p.step.sequences[p.sequence_begin + s].table_begin,
                                    work.key_begin + row_to - offsets.keys[s], row_to, item % heads);
  }
}

template <typename T, int D>
cudaError_t launch_gather(const PrefillParams& p, cudaStream_t stream) {
  const int bytes = (p.sequence_end - p.sequence_begin + 1) * 8;
  if (p.values == nullptr) {
    return launch(gather_kernel<T, D, false>, p.sm_count * 8, threads, bytes, stream, p);
  }
  return launch(gather_kernel<T, D, true>, p.sm_count * 4, threads, bytes, stream, p);
}

template <typename T>
cudaError_t launch_head_dim(const PrefillParams& p, int padded_dim, cudaStream_t stream) {
  if (padded_dim == 64) return launch_gather<T, 64>(p, stream);
  if (padded_dim == 128) return launch_gather<T, 128>(p, stream);
  return launch_gather<T, 256>(p, stream);
}

}  // namespace

cudaError_t gather_keys_and_values(const PrefillParams& p, kvs_dtype dtype, int padded_dim, cudaStream_t stream) {
  return dtype == KVS_BF16 ? launch_head_dim<__nv_bfloat16>(p, padded_dim, stream)
                           : launch_head_dim<__half>(p, padded_dim, stream);
}

}  // namespace kvs
