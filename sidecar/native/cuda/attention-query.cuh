// Prefill attention, the rows of q: read, turned to their positions, and handed on in chunks of 8 values. Loads of
// several chunks go out before the first is turned: one after the other they took a third of a tile's time.

#pragma once

#include "attention-prefill.cuh"

namespace kvs {

/** Two chunks of a tile's row of q that turn together, or, behind those that turn, two neighbours. */
template <typename T>
struct QueryPair {
  int low;  // chunk of the row
  int high;
  bool is_turned;
  uint4 low_values;
  uint4 high_values;
  Angles angles;

  /** index: of the row's chunks / 2 pairs. Rows and chunks outside the tile are zeros. */
  __device__ __forceinline__ void load(const PrefillParams& p, const PrefillItem& item, int row, int index) {
    const int turned = p.rotary_half / 8;
    is_turned = index < turned;
    low = is_turned ? index : 2 * index;
    high = is_turned ? index + turned : low + 1;
    low_values = high_values = {0, 0, 0, 0};
    const int token = p.token_of(row);
    if (token >= item.tile.tokens) {
      is_turned = false;
      return;
    }
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) +
                                                       row_offset(p, item, token, row - token * p.packed_heads));
    if (low * 8 < p.head_dim) low_values = from[low];
    if (high * 8 < p.head_dim) high_values = from[high];
    if (!is_turned) return;
    const int64_t at = static_cast<int64_t>(item.tile.first_position + token) * p.rotary_half + low * 8;
    angles = Angles(p.cosine + at, p.sine + at);
  }

  __device__ __forceinline__ void turn() {
    if (!is_turned) return;
    const uint4 turned = turn_chunk<T>(low_values, high_values, angles, true);
    high_values = turn_chunk<T>(high_values, low_values, angles, false);
    low_values = turned;
  }
};

/** A pair of chunks in each of `count` rows row, row + stride, ..., in flight at once, to store(row, chunk, values). */
template <typename T, int count, int stride, typename Store>
__device__ __forceinline__ void load_queries(const PrefillParams& p, const PrefillItem& item, int row, int pair,
                                             const Store& store) {
  QueryPair<T> pairs[count];
#pragma unroll
  for (int i = 0; i < count; ++i) pairs[i].load(p, item, row + i * stride, pair);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    pairs[i].turn();
    store(row + i * stride, pairs[i].low, pairs[i].low_values);
    store(row + i * stride, pairs[i].high, pairs[i].high_values);
  }
}

}  // namespace kvs
