// A skinny product as its kernel sees it: how it is divided among thread blocks and their warps.

#pragma once

#include <cstdint>

#include "skinny-matmul.h"

namespace kvs {

constexpr int skinny_warps = 16;
constexpr int skinny_threads = skinny_warps * 32;
constexpr int skinny_chunks_max = 16;  // of K; x comes chunk by chunk, and is used as soon as it is there
constexpr int tile_outputs = 16;       // of a warp: a lower eight and an upper one

/** Outputs are dealt to blocks in items: eights, two neighbours a tile; of a gated product an eight of the first half
 * with its counterpart of the second, which are a tile. */
struct SkinnyParams {
  void* y;
  const void* x;
  const void* weight;
  const float* scales;
  const float* bias;
  void* gated;
  float* partials;  // (slice, eight, row, 8 outputs)
  int* counters;    // of the blocks that share outputs
  int rows;
  int outputs;
  int inputs;
  int eights;        // of outputs
  int items;         // of outputs
  int k_units;       // of K, of unit_values each
  int slices;        // of K
  int slice_blocks;  // thread blocks of a slice
  int items_each;    // of a thread block; the first items_extra blocks take one more
  int items_extra;
  int passes;       // over K, when a block has more tiles than warps
  int pass_tiles;   // of a pass
  int sharing;      // warps of a tile
  int chunk_units;  // of K, whose x comes at once; a multiple of sharing, or all of the slice
  int loads;        // of 16 bytes, a lane, an output and a unit
  int stages;       // of a warp's ring, a unit each
  int x_bytes;      // of x
  bool is_accumulating;
  bool is_f32_out;
};

/** Outputs of a tile: eight from each on. */
struct TileOutputs {
  int low;
  int high;
  bool has_high;
};

/** What a thread block works on: in each pass up to one tile a warp, in each tile chunk after chunk of K. */
struct BlockWork {
  int slice;
  int k_begin;  // units, of all K
  int k_units;
  int item_begin;
  int items;
  int tiles;
  int chunks;       // of a pass
  int first_chunk;  // blocks begin at different places, so that they do not all want the same part of memory

  __device__ explicit BlockWork(const SkinnyParams& p) {
    const int block = blockIdx.x;
    slice = blockIdx.y;
    k_begin = p.k_units * slice / p.slices;
    k_units = p.k_units * (slice + 1) / p.slices - k_begin;
    item_begin = block * p.items_each + min(block, p.items_extra);
    items = p.items_each + (block < p.items_extra ? 1 : 0);
    tiles = p.gated != nullptr ? items : (items + 1) / 2;
    chunks = (k_units + p.chunk_units - 1) / p.chunk_units;
    first_chunk = static_cast<int>(static_cast<uint32_t>(block * chunks) / gridDim.x);
  }
  /** The i-th chunk of a pass. */
  __device__ __forceinline__ int chunk(int i) const {
    const int at = i + first_chunk;
    return at < chunks ? at : at - chunks;
  }
  /** Units of K in it. */
  __device__ __forceinline__ int chunk_units(const SkinnyParams& p, int chunk) const {
    return min(p.chunk_units, k_units - chunk * p.chunk_units);
  }
  __device__ __forceinline__ TileOutputs outputs(const SkinnyParams& p, int tile) const {
    if (p.gated != nullptr) {
      const int low = (item_begin + tile) * 8;
      return {low, low + p.outputs / 2, true};
    }
    const int low = (item_begin + 2 * tile) * 8;
    return {low, low + 8, 2 * tile + 1 < items};
  }
};

/** A warp's place among those of its block. */
struct WarpPlace {
  int tile;  // of a pass
  int part;  // of the warps that share a tile: it takes every sharing-th unit of a chunk

  __device__ explicit WarpPlace(const SkinnyParams& p) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    tile = warp / p.sharing;
    part = warp - tile * p.sharing;
    if (tile >= p.pass_tiles) tile = 1 << 20;
  }
  /** Tile of the block in this pass; not below work.tiles: none. */
  __device__ __forceinline__ int tile_of(const SkinnyParams& p, int pass) const { return pass * p.pass_tiles + tile; }
};

}  // namespace kvs
