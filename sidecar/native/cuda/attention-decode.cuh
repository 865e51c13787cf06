// Decode attention, the division of its work: every (sequence, unit of query heads) pair is a run of tiles of 16 keys;
// all runs lie behind one another, and each thread block takes an equal, contiguous share of the whole, so that one
// long sequence and many short ones keep all SMs equally busy. Lengths are read on the device: a captured graph stays
// valid.

#pragma once

#include "attention-kernels.h"
#include "warp-tensor.cuh"

namespace kvs {

constexpr int decode_tile_tokens = 16;

struct DecodeParams {
  void* y;
  const void* q;
  const char* kv;
  uint64_t block_stride_bytes;
  uint32_t head_stride_bytes;  // between kv heads of one block
  uint32_t value_bytes;        // from keys to values
  const float* cosine;
  const float* sine;
  const float* slopes;
  float scale_log2;
  int window;
  int heads;
  int group;  // query heads of a kv head
  int units;  // kv heads * units_per_group
  int units_per_group;
  int head_dim;
  int rotary_half;
  int block_tokens;
  int tile_tokens;  // 16, or 8 in blocks of 8
  int tile_tokens_log2;
  int tiles_per_block_log2;
  int stages;
  int row_count;
  int sequence_count;
  bool is_decode;
  DeviceStep step;
  float2* states;   // (partial, head of unit): max, sum. Zero: not written yet
  float* partials;  // (partial, head of unit, padded head_dim). Likewise
};

/** What the tiles of the step are, in shared memory; arrays of sequence_count. */
struct DecodeSequences {
  int* first_tile;  // of the step, per unit: prefix sums, one more at the end
  int* position;    // of the row
  int* table_begin;
  int* row;
  int* warp_sums;  // (warps) of the scan
};

__device__ __forceinline__ int first_visible(int position, int window) {
  return window > 0 ? max(0, position + 1 - window) : 0;
}

/** First tile of the view and number of tiles that a row at `position` sees. */
__device__ __forceinline__ int2 visible_tiles(const DecodeParams& p, int position) {
  const int begin = first_visible(position, p.window) >> p.tile_tokens_log2;
  return {begin, (position >> p.tile_tokens_log2) + 1 - begin};
}

/** Fills `of` and returns the tiles of one unit over all sequences. All threads of the block. */
template <int threads>
__device__ int scan_sequences(const DecodeParams& p, const DecodeSequences& of) {
  const int live = min(p.sequence_count, p.step.counts->sequence_count);
  const int per_thread = (p.sequence_count + threads - 1) / threads;
  const int begin = threadIdx.x * per_thread;
  const int end = min(begin + per_thread, p.sequence_count);
  int sum = 0;
  for (int s = begin; s < end; ++s) {
    const kvs_step_sequence sequence = p.step.sequences[s];
    int row = s;
    int position;
    if (p.is_decode) {
      position = p.step.row_position[s];  // at once, not after the sequence is known
    } else {
      row = s < live && sequence.row_count == 1 ? sequence.row_begin : 0;
      position = p.step.row_position[row];
    }
    const bool is_mine = s < live && sequence.row_count == 1;
    of.position[s] = position;
    of.table_begin[s] = sequence.table_begin;
    of.row[s] = row;
    of.first_tile[s] = sum;
    sum += is_mine ? visible_tiles(p, position).y : 0;
  }
  int inclusive = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(full_warp, inclusive, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) inclusive += below;
  }
  if (threadIdx.x % 32 == 31) of.warp_sums[threadIdx.x / 32] = inclusive;
  __syncthreads();
  int before = inclusive - sum;
  int total = 0;
  for (int w = 0; w < threads / 32; ++w) {
    if (w < static_cast<int>(threadIdx.x / 32)) before += of.warp_sums[w];
    total += of.warp_sums[w];
  }
  for (int s = begin; s < end; ++s) of.first_tile[s] += before;
  if (threadIdx.x == 0) of.first_tile[p.sequence_count] = total;
  __syncthreads();
  return total;
}

/** The shares of `total` tiles: block b of the grid takes [begin(b), begin(b + 1)). */
struct DecodeShares {
  uint32_t each;
  uint32_t larger;  // so many first blocks take one more

  /** A block takes at least tiles_min, so that a few tiles are not scattered over the whole GPU. */
  __device__ DecodeShares(int total, int blocks, int tiles_min) : limit(total) {
    const uint32_t used = max(1, min(blocks, total / tiles_min));
    each = static_cast<uint32_t>(total) / used;
    larger = static_cast<uint32_t>(total) - each * used;
  }
  __device__ int begin(uint32_t block) const { return min(limit, static_cast<int>(block * each + min(block, larger))); }
  __device__ int owner(uint32_t tile) const {
    const uint32_t of_larger = larger * (each + 1);
    return static_cast<int>(tile < of_larger ? tile / (each + 1) : larger + (tile - of_larger) / each);
  }

 private:
  int limit;
};

/** The part of one pair that a thread block works on without a break. */
struct DecodeSegment {
  int sequence;
  int unit;
  int pair_begin;  // tiles of the step before the pair
  int pair_tiles;
  int skipped;  // tiles of the pair before the segment
  int count;

  __device__ bool is_whole() const { return count == pair_tiles; }
  /** This block has the last part of a pair that others began: it adds up. */
  __device__ bool is_closing() const { return skipped > 0 && skipped + count == pair_tiles; }
};

__device__ __forceinline__ DecodeSegment segment_at(const DecodeParams& p, const int* first_tile, int tile, int limit) {
  int low = 0;
  int high = p.sequence_count - 1;
  while (low < high) {  // the last sequence that begins at or before the tile
    const int middle = (low + high + 1) / 2;
    if (first_tile[middle] * p.units <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  DecodeSegment segment;
  segment.sequence = low;
  segment.pair_tiles = first_tile[low + 1] - first_tile[low];
  const int local = tile - first_tile[low] * p.units;
  segment.unit = static_cast<int>(static_cast<uint32_t>(local) / static_cast<uint32_t>(segment.pair_tiles));
  segment.skipped = local - segment.unit * segment.pair_tiles;
  segment.pair_begin = tile - segment.skipped;
  segment.count = min(segment.pair_tiles - segment.skipped, limit - tile);
  return segment;
}

}  // namespace kvs
