// Prefill attention, what its kernels share: the plan of tiles, made on the device from the step's lengths, and the
// tile's rows. A tile is up to 128 rows, packed as (token, query head of the group), so that a group shares each read
// of K and V also when there are few tokens; when tiles are few, each is split over its keys.

#pragma once

#include "attention-kernels.h"
#include "warp-tensor.cuh"

namespace kvs {

constexpr int key_block = 128;  // keys and values are gathered, and divided among tiles, in blocks of so many
constexpr int prefill_tiles_max = 8192;
constexpr int prefill_slots_per_sm = 3;

/** Rows of one sequence against the key blocks [block_begin, block_end) of its view, one of `splits` parts. */
struct PrefillTile {
  int row_begin;  // of the step
  int tokens;
  int first_position;  // of the first row
  int key_shift;       // row of the gathered keys = position + key_shift
  int block_begin;
  int block_end;
  int split;
  int splits;       // the parts of a tile are neighbours
  int context;      // positions of the sequence, this step's rows included
  int table_begin;  // its part of the block table
};

struct PrefillPlan {
  int tile_count;
  int next_item;  // items are (tile, unit); thread blocks take them in this order
  int reserved[2];
  PrefillTile tiles[prefill_tiles_max];
};

struct PrefillParams {
  void* y;
  const void* q;
  const char* kv;
  uint64_t block_stride_bytes;
  uint32_t head_stride_bytes;
  uint32_t value_bytes;
  const float* cosine;
  const float* sine;
  const float* slopes;
  float scale_log2;
  int window;
  int heads;
  int group;         // query heads of a kv head
  int packed_heads;  // query heads of a tile: a divisor of group
  int packed_inverse;  // 65536 / packed_heads, rounded up
  int head_dim;
  int rotary_half;
  int block_tokens;
  int block_tokens_log2;
  int row_count;
  int sequence_begin;  // this pass serves sequences [begin, end) and kv heads [begin, end)
  int sequence_end;
  int kv_head_begin;
  int kv_head_end;
  int tile_tokens;
  int sm_count;
  int section_units;  // units whose keys and values stay in the L2 cache while all tiles pass over them
  DeviceStep step;
  PrefillPlan* plan;
  float2* states;   // (tile, unit, row): max, sum
  float* partials;  // (tile, unit, row, padded head_dim)
  void* keys;       // (kv head, key_capacity, padded head_dim)
  void* values;
  int key_capacity;

  /** Of a row of a tile: row / packed_heads, exact for the 128 there can be. */
  __device__ int token_of(int row) const { return row * packed_inverse >> 16; }
  __host__ __device__ int units() const { return (kv_head_end - kv_head_begin) * (group / packed_heads); }
};

/** A tile and the query heads [head_begin, head_begin + packed_heads) of one kv head. */
struct PrefillItem {
  PrefillTile tile;
  int tile_index;
  int unit;
  int kv_head;     // of the pass
  int head_begin;  // of all query heads
};

/** The query heads of a unit of the pass. */
__device__ __forceinline__ void place_unit(const PrefillParams& p, PrefillItem& item, int unit) {
  const int parts = p.group / p.packed_heads;
  item.unit = unit;
  item.kv_head = unit / parts;
  item.head_begin = (p.kv_head_begin + item.kv_head) * p.group + unit % parts * p.packed_heads;
}

/** Items run through sections of units, in a section through tiles, longest first, in a tile through units. */
__device__ __forceinline__ PrefillItem prefill_item(const PrefillParams& p, int item, int tile_count) {
  PrefillItem result;
  const int section = item / (tile_count * p.section_units);
  const int first_unit = section * p.section_units;
  const int units = min(p.section_units, p.units() - first_unit);
  const int local = item - tile_count * first_unit;
  result.tile_index = local / units;
  result.tile = p.plan->tiles[result.tile_index];
  place_unit(p, result, first_unit + local - result.tile_index * units);
  return result;
}

/** Element offset of a tile's row in q and y. */
__device__ __forceinline__ uint64_t row_offset(const PrefillParams& p, const PrefillItem& item, int token, int head) {
  return (static_cast<uint64_t>(item.tile.row_begin + token) * p.heads + item.head_begin + head) * p.head_dim;
}

/** Of 8 neighbouring pairs. */
struct Angles {
  float4 cosine[2];
  float4 sine[2];

  Angles() = default;
  __device__ __forceinline__ Angles(const float* c, const float* s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cosine[i] = __ldg(reinterpret_cast<const float4*>(c) + i);
      sine[i] = __ldg(reinterpret_cast<const float4*>(s) + i);
    }
  }
};

/** 8 values turned by the angles of their pairs: own * cos -+ partner * sin. */
template <typename T>
__device__ __forceinline__ uint4 turn_chunk(uint4 own, uint4 partner, const Angles& angles, bool is_low) {
  const float4(&c)[2] = angles.cosine;
  const float4(&s)[2] = angles.sine;
  const float sign = is_low ? -1.0f : 1.0f;
  const auto pair = [&](uint32_t a, uint32_t b, float cx, float cy, float sx, float sy) {
    const float2 x = unpack_pair<T>(a);
    const float2 y = unpack_pair<T>(b);
    return pack_pair<T>(x.x * cx + sign * (y.x * sx), x.y * cy + sign * (y.y * sy));
  };
  return {
      pair(own.x, partner.x, c[0].x, c[0].y, s[0].x, s[0].y), pair(own.y, partner.y, c[0].z, c[0].w, s[0].z, s[0].w),
      pair(own.z, partner.z, c[1].x, c[1].y, s[1].x, s[1].y), pair(own.w, partner.w, c[1].z, c[1].w, s[1].z, s[1].w)};
}

/** Which chunk of 8 turns with `chunk`, and by the angles of which pairs; rotary_half is a multiple of 8. */
struct ChunkTurn {
  bool is_turned;
  bool is_low;
  int partner;
  int pair;

  __device__ ChunkTurn(int chunk, int rotary_half) {
    is_low = chunk * 8 < rotary_half;
    is_turned = chunk * 8 < 2 * rotary_half;
    partner = is_low ? chunk + rotary_half / 8 : chunk - rotary_half / 8;
    pair = is_low ? chunk * 8 : chunk * 8 - rotary_half;
  }
};

/** Makes the plan, gathers keys (turned to their positions) and, where wanted, values of the pass, clears rows of
 * padding. */
cudaError_t gather_keys_and_values(const PrefillParams& p, kvs_dtype dtype, int padded_dim, cudaStream_t stream);

/** Parts of split tiles become rows of y. Rows of a tile: those of the kernel that made the parts. */
cudaError_t combine_parts(const PrefillParams& p, kvs_dtype dtype, int padded_dim, cudaStream_t stream);

/** Tiles of 128 rows (64 at head_dim 256) on mma.sync: sm_80 and later. */
cudaError_t prefill_tiles(const PrefillParams& p, kvs_dtype dtype, int padded_dim, const AttentionArgs& args);

/** The same on wgmma and the tensor copy engine: sm_90a, head_dim up to 128. */
bool has_hopper_prefill(int compute_capability, int padded_dim);
/** Whether they can take values out of the blocks, so that these need not be gathered. */
bool reads_values_in_place(const AttentionArgs& args);
cudaError_t prefill_tiles_hopper(const PrefillParams& p, kvs_dtype dtype, int padded_dim, const AttentionArgs& args);

}  // namespace kvs
