// How a stream-K product is divided: all (tile of outputs, piece of K) lie behind one another and each thread block
// takes an equal share, so that every multiprocessor moves as many bytes of W, whatever the sizes. What several blocks
// share of a tile is added up by those of them for which it is the last, each some of the rows.

#pragma once

#include "skinny-matmul.h"

namespace kvs {

struct StreamKParams {
  void* y;
  const float* scales;  // of the outputs, or null
  const float* bias;
  void* gated;
  float* parts;  // (thread block, 2, part of a thread, thread) float4
  int rows;
  int outputs;
  int pieces;  // of K; the last one may reach beyond it
  int total;   // pieces of all tiles
  bool is_accumulating;
  bool is_f32_out;
};

/** Equal shares of `total` pieces. */
struct StreamKShares {
  uint32_t each;
  uint32_t larger;  // so many first blocks take one more

  __device__ explicit StreamKShares(int total)
      : each(static_cast<uint32_t>(total) / gridDim.x), larger(static_cast<uint32_t>(total) - each * gridDim.x) {}
  __device__ int begin(uint32_t block) const { return static_cast<int>(block * each + min(block, larger)); }
  __device__ int owner(uint32_t piece) const {
    const uint32_t of_larger = larger * (each + 1);
    return static_cast<int>(piece < of_larger ? piece / (each + 1) : larger + (piece - of_larger) / each);
  }
};

/** What a thread block has to do with a tile. Its sums come in parts of eight rows. */
struct StreamKSegment {
  int tile;
  int end;          // pieces before the tile's end
  int first_block;  // of those that share it
  int last_block;
  bool goes_on;  // the last block, with the next tile
  int part_begin = 0;  // those that this block finishes
  int part_end;

  __device__ StreamKSegment(const StreamKParams& p, const StreamKShares& shares, int tile, int parts)
      : tile(tile),
        end((tile + 1) * p.pieces),
        first_block(shares.owner(tile * p.pieces)),
        last_block(shares.owner(end - 1)),
        goes_on(shares.begin(last_block + 1) > end),
        part_end(parts) {
    if (is_whole()) return;
    const int block = static_cast<int>(blockIdx.x);
    if (is_left_behind(block)) {
      part_end = 0;
      return;
    }
    const int closing = last_block - first_block + (goes_on ? 0 : 1);
    const int index = block - first_block;
    part_begin = parts * index / closing;
    part_end = parts * (index + 1) / closing;
  }
  __device__ bool is_whole() const { return first_block == last_block; }
  /** The block that goes on leaves its parts to the others, which come to their ends with this tile. */
  __device__ bool is_left_behind(int block) const { return goes_on && block == last_block; }
  __device__ bool has(int part) const { return part >= part_begin && part < part_end; }
  /** Where a block leaves its parts: those of its last tile lie apart from those that it left behind. */
  __device__ int slot_of(int block) const { return block * 2 + (is_left_behind(block) ? 0 : 1); }
};

}  // namespace kvs
