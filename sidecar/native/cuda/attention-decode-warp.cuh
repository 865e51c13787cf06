// Decode attention, one warp: the ring of tiles that it fetches ahead of its arithmetic, the query turned block by
// block, and the running softmax. S^T = K q^T and O^T = V^T P^T put keys and values on the 16-wide side of the tensor
// cores and the query heads of a group on the 8-wide one: K and V are read once for all heads of the group.

#pragma once

#include "attention-decode.cuh"

namespace kvs {

template <typename T, int D, int heads_8, int warps_>
struct DecodeShape {
  static constexpr int warps = warps_;
  static constexpr int threads = warps * 32;
  static constexpr int heads = 8 * heads_8;  // of a unit, padded
  static constexpr int row_bytes = D * 2;    // of a key or value; its 16-byte chunks change places, see swizzled()
  static constexpr int stage_bytes = 2 * decode_tile_tokens * row_bytes;
  static constexpr int query_pitch = D * 2 + 16;  // bytes: odd in 16-byte words, no bank conflicts
  static constexpr int query_bytes = heads * query_pitch;
  static constexpr int merge_pitch = D + 4;  // floats
  static constexpr int merge_bytes = warps * heads * merge_pitch * 4;
  /** Queries, and at the end of a segment in their place what the warps merge. */
  static constexpr int query_or_merge_bytes =
      merge_bytes > warps * 2 * query_bytes ? merge_bytes : warps * 2 * query_bytes;
  static constexpr int angle_pairs = (D / 2 + 63) / 64;  // pairs of angles a lane turns, by two

  static int shared_bytes(int stages, int sequence_count) {
    const int facts = 4 * sequence_count + 1 + warps;
    return warps * stages * stage_bytes + query_or_merge_bytes + warps * heads * 8 + facts * 4;
  }
};

/** Where a chunk of 16 bytes lies in its row in shared memory, in bytes: a chunk of eight rows lies in different banks.
 * Of a place in a row, where rows begin at multiples of their size, `place ^ swizzled(0, n)` is that of the chunk whose
 * number differs by the bits of n. */
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(chunk ^ (row & 7)) * 16;
}

/** The loading side of a warp: runs ahead of the arithmetic, over the borders of segments. */
template <typename Shape, int D>
struct TileFetcher {
  const DecodeParams& p;
  const DecodeSequences& of;
  const uint64_t policy = read_once_policy();
  int next;  // tile of the step where the next segment begins
  int limit;
  int tile = 0;  // of the view
  int tile_end = 0;
  int position = 0;
  const char* head = nullptr;
  const int* table = nullptr;
  int table_at = 0;  // block of the view whose id lane 0 holds
  int ids = 0;       // lane l: id of block table_at + l

  __device__ TileFetcher(const DecodeParams& p, const DecodeSequences& of, int begin, int limit)
      : p(p), of(of), next(begin), limit(limit) {}

  /** False: no tile is left. */
  __device__ bool open_next() {
    while (tile == tile_end) {
      if (next >= limit) return false;
      const DecodeSegment segment = segment_at(p, of.first_tile, next, limit);
      next += segment.count;
      position = of.position[segment.sequence];
      const int first = visible_tiles(p, position).x + segment.skipped;
      const int warp = threadIdx.x / 32;
      tile = first + segment.count * warp / Shape::warps;
      tile_end = first + segment.count * (warp + 1) / Shape::warps;
      head = p.kv + static_cast<uint64_t>(segment.unit / p.units_per_group) * p.head_stride_bytes;
      table = p.step.block_table + of.table_begin[segment.sequence];
      table_at = -64;
    }
    return true;
  }

  /** Whether the next tile holds the step's own key, which the kernel before this one may still be writing. */
  __device__ bool is_next_tile_fresh() const { return tile == position >> p.tile_tokens_log2; }

  __device__ void fetch_next(uint32_t stage) {
    const int lane = threadIdx.x % 32;
    const int block = tile >> p.tiles_per_block_log2;
    if (block - table_at >= 32) {
      table_at = block;
      const int last = (tile_end - 1) >> p.tiles_per_block_log2;
      ids = table[min(block + lane, last)];
    }
    const int id = __shfl_sync(full_warp, ids, block - table_at);
    const int tile_of_block = tile & ((1 << p.tiles_per_block_log2) - 1);
    constexpr int row_chunks = D / 8;
    constexpr int rows_each = 32 / row_chunks;
    const int chunk = lane % row_chunks;
    const int row = lane / row_chunks;
    const int row_bytes = p.head_dim * 2;
    const char* from = head + static_cast<uint64_t>(id) * p.block_stride_bytes +
                       (tile_of_block * decode_tile_tokens + row) * row_bytes + chunk * 16;
    const auto place = [&](int i) {  // rows_each is a power of two above `row`
      return (stage + (row + i * rows_each) * Shape::row_bytes + swizzled(row, chunk)) ^ swizzled(i * rows_each, 0);
    };
    const int rows_valid = min(position - (tile << p.tile_tokens_log2) + 1, p.tile_tokens) - row;
    if (chunk * 8 < p.head_dim) {
#pragma unroll
      for (int i = 0; i < decode_tile_tokens / rows_each; ++i) {
        copy_async_16(place(i), from + i * rows_each * row_bytes, i * rows_each < rows_valid, policy);
      }
#pragma unroll
      for (int i = 0; i < decode_tile_tokens / rows_each; ++i) {
        copy_async_16(place(i) + decode_tile_tokens * Shape::row_bytes,
                      from + p.value_bytes + i * rows_each * row_bytes, i * rows_each < rows_valid, policy);
      }
    }
    ++tile;
  }
};

/** The query heads of a unit: as they came, turned against a block's base, and as fragments of the product. */
template <typename T, int D, int heads_8, typename Shape>
struct TurnedQuery {
  uint32_t fragment[heads_8][D / 16][2];
  float2 cosine[Shape::angle_pairs];
  float2 sine[Shape::angle_pairs];

  /** Copies the unit's q into both buffers; what is not turned, and padding, stays there. */
  __device__ void load(const DecodeParams& p, char* raw, int row, int head_begin, int head_count) {
    const int lane = threadIdx.x % 32;
    const char* from =
        static_cast<const char*>(p.q) + (static_cast<uint64_t>(row) * p.heads + head_begin) * p.head_dim * 2;
    constexpr int chunks = Shape::heads * D / 8 / 32;  // of a lane
    constexpr int batch = chunks < 8 ? chunks : 8;
#pragma unroll
    for (int begin = 0; begin < chunks; begin += batch) {
      uint4 value[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = (begin + i) * 32 + lane;
        const int head = at / (D / 8);
        const int chunk = at % (D / 8);
        value[i] = {0, 0, 0, 0};
        if (head < head_count && chunk * 8 < p.head_dim) {
          value[i] = *reinterpret_cast<const uint4*>(from + head * p.head_dim * 2 + chunk * 16);
        }
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = (begin + i) * 32 + lane;
        char* to = raw + at / (D / 8) * Shape::query_pitch + at % (D / 8) * 16;
        *reinterpret_cast<uint4*>(to) = value[i];
        *reinterpret_cast<uint4*>(to + Shape::query_bytes) = value[i];
      }
    }
    __syncwarp();
  }

  __device__ void load_angles(const DecodeParams& p, int distance) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Shape::angle_pairs; ++i) {
      const int pair = 2 * lane + 64 * i;
      if (pair < p.rotary_half) {
        const int64_t at = static_cast<int64_t>(distance) * p.rotary_half + pair;
        cosine[i] = __ldg(reinterpret_cast<const float2*>(p.cosine + at));
        sine[i] = __ldg(reinterpret_cast<const float2*>(p.sine + at));
      }
    }
  }

  /** Turns by the angles at hand. */
  __device__ void turn(const DecodeParams& p, char* raw, int head_count) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Shape::angle_pairs; ++i) {
      const int pair = 2 * lane + 64 * i;
      if (pair < p.rotary_half) {
        const char* low = raw + pair * 2;
        const char* high = low + p.rotary_half * 2;
        for (int head = 0; head < head_count; ++head) {
          const float2 a = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(low + head * Shape::query_pitch));
          const float2 b = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(high + head * Shape::query_pitch));
          char* to = const_cast<char*>(low) + Shape::query_bytes + head * Shape::query_pitch;
          *reinterpret_cast<uint32_t*>(to) =
              pack_pair<T>(a.x * cosine[i].x - b.x * sine[i].x, a.y * cosine[i].y - b.y * sine[i].y);
          *reinterpret_cast<uint32_t*>(to + p.rotary_half * 2) =
              pack_pair<T>(b.x * cosine[i].x + a.x * sine[i].x, b.y * cosine[i].y + a.y * sine[i].y);
        }
      }
    }
    __syncwarp();
  }

  __device__ void load_fragments(const char* raw) {
    const int lane = threadIdx.x % 32;
    const uint32_t from = shared_address(raw) + Shape::query_bytes + (lane % 8) * Shape::query_pitch + (lane / 8) * 16;
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
#pragma unroll
      for (int k = 0; k < D / 16; k += 2) {
        uint32_t four[4];
        load_matrices(four, from + n * 8 * Shape::query_pitch + k * 32);
        fragment[n][k][0] = four[0];
        fragment[n][k][1] = four[1];
        fragment[n][k + 1][0] = four[2];
        fragment[n][k + 1][1] = four[3];
      }
    }
  }
};

/** Running softmax and output of one warp: lane (group, quad) holds heads 2 quad + {0, 1} of each eight. */
template <typename T, int D, int heads_8>
struct HeadState {
  float max[heads_8][2];
  float sum[heads_8][2];
  float out[heads_8][D / 16][4];  // dims 16 i + group + {0, 8}, heads as above

  __device__ void reset() {
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
      max[n][0] = max[n][1] = -INFINITY;
      sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < D / 16; ++d) out[n][d][0] = out[n][d][1] = out[n][d][2] = out[n][d][3] = 0.0f;
    }
  }

  /** Scores (log2 units) of 16 keys become weights and, transposed, an operand of the second product. */
  __device__ void add_scores(float (&score)[heads_8][4], uint32_t (&weights)[heads_8][2]) {
    bool is_rescaled = false;
    float factor[heads_8][2];
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = fmaxf(score[n][j], score[n][2 + j]);
        most = fmaxf(most, __shfl_xor_sync(full_warp, most, 4));
        most = fmaxf(most, __shfl_xor_sync(full_warp, most, 8));
        most = fmaxf(most, __shfl_xor_sync(full_warp, most, 16));
        const float now = fmaxf(max[n][j], most);
        is_rescaled |= now > max[n][j];
        factor[n][j] = exp2_fast(max[n][j] - now);
        max[n][j] = now;
        score[n][j] = exp2_fast(score[n][j] - now);
        score[n][2 + j] = exp2_fast(score[n][2 + j] - now);
        sum[n][j] = sum[n][j] * factor[n][j] + score[n][j] + score[n][2 + j];
      }
      weights[n][0] = transpose_matrix(pack_pair<T>(score[n][0], score[n][1]));
      weights[n][1] = transpose_matrix(pack_pair<T>(score[n][2], score[n][3]));
    }
    if (!__any_sync(full_warp, is_rescaled)) return;
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        out[n][d][0] *= factor[n][0];
        out[n][d][1] *= factor[n][1];
        out[n][d][2] *= factor[n][0];
        out[n][d][3] *= factor[n][1];
      }
    }
  }

  __device__ void add_up_sums() {
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        for (int step = 4; step < 32; step *= 2) sum[n][j] += __shfl_xor_sync(full_warp, sum[n][j], step);
      }
    }
  }
};

/** One tile: scores, softmax, values. `stage` holds 16 rows of K, then of V. */
template <typename T, int D, int heads_8, typename Shape>
__device__ __forceinline__ void attend_tile(const DecodeParams& p, uint32_t stage, int key, int position,
                                            const TurnedQuery<T, D, heads_8, Shape>& query,
                                            const float (&slope)[heads_8][2], HeadState<T, D, heads_8>& state) {
  const int lane = threadIdx.x % 32;
  float score[heads_8][4] = {};
  float other[heads_8][4] = {};  // a second chain hides the latency of the first
  const uint32_t key_rows = stage + (lane % 16) * Shape::row_bytes + swizzled(lane, lane / 16);
#pragma unroll
  for (int k = 0; k < D / 16; k += 2) {
    uint32_t a[4];
    load_matrices(a, key_rows ^ swizzled(0, 2 * k));
#pragma unroll
    for (int n = 0; n < heads_8; ++n) mma_16x8x16<T>(score[n], a, query.fragment[n][k][0], query.fragment[n][k][1]);
    load_matrices(a, key_rows ^ swizzled(0, 2 * k + 2));
#pragma unroll
    for (int n = 0; n < heads_8; ++n) {
      mma_16x8x16<T>(other[n], a, query.fragment[n][k + 1][0], query.fragment[n][k + 1][1]);
    }
  }
  const int first = first_visible(position, p.window);
  const bool is_partial = key + decode_tile_tokens - 1 > position || key < first || p.tile_tokens < decode_tile_tokens;
#pragma unroll
  for (int n = 0; n < heads_8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = lane / 4 + (i / 2) * 8;
      float value = (score[n][i] + other[n][i]) * p.scale_log2;
      if (p.slopes != nullptr) value += slope[n][i % 2] * static_cast<float>(key + token - position);
      if (is_partial && (key + token > position || key + token < first || token >= p.tile_tokens)) value = -INFINITY;
      score[n][i] = value;
    }
  }
  uint32_t weights[heads_8][2];
  state.add_scores(score, weights);
  const uint32_t value_rows = stage + (decode_tile_tokens + lane % 8 + lane / 16 * 8) * Shape::row_bytes +
                              swizzled(lane, lane / 8 % 2);
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    uint32_t a[4];
    load_matrices_transposed(a, value_rows ^ swizzled(0, 2 * d));
#pragma unroll
    for (int n = 0; n < heads_8; ++n) mma_16x8x16<T>(state.out[n][d], a, weights[n][0], weights[n][1]);
  }
}

}  // namespace kvs
