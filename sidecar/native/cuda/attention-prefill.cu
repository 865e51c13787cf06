// Prefill attention on mma.sync (the tiling of FlashAttention-2): four warps, each with its own rows of q, pass over
// the gathered keys and values in small tiles with a running softmax; cp.async brings the next tile while one is in
// work.

#include "attention-prefill.cuh"
#include "attention-query.cuh"
#include "launch.cuh"

namespace kvs {
namespace {

constexpr int threads = 128;
constexpr int warps = threads / 32;

template <typename T_, int D_, int row_tiles_, int keys_>
struct PrefillShape {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int row_tiles = row_tiles_;  // of 16 rows, per warp
  static constexpr int rows = warps * row_tiles * 16;
  static constexpr int keys = keys_;
  static constexpr int pitch = D * 2 + 16;
  static constexpr int shared_bytes = (rows + 2 * keys) * pitch;
};

/** Rows of `from` (padded_dim values each) into shared memory. */
template <typename Shape>
__device__ __forceinline__ void fetch_rows(uint32_t to, const typename Shape::T* from) {
  constexpr int row_chunks = Shape::D / 8;
#pragma unroll
  for (int i = 0; i < Shape::keys * row_chunks / threads; ++i) {
    const int index = i * threads + threadIdx.x;
    copy_async_16(to + index / row_chunks * Shape::pitch + index % row_chunks * 16, from + index * 8, true);
  }
}

/** Softmax and output of the warp's rows: lane (group, quad) holds rows group + {0, 8} of each 16. */
template <typename Shape>
struct RowState {
  float max[Shape::row_tiles][2];
  float sum[Shape::row_tiles][2];
  float out[Shape::row_tiles][Shape::D / 8][4];

  __device__ void reset() {
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
      max[m][0] = max[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < Shape::D / 8; ++d) out[m][d][0] = out[m][d][1] = out[m][d][2] = out[m][d][3] = 0.0f;
    }
  }

  /** Raw scores become weights; scale_log2 turns them into powers of two. */
  __device__ void add_scores(float (&score)[Shape::row_tiles][Shape::keys / 8][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = max[m][j];
#pragma unroll
        for (int n = 0; n < Shape::keys / 8; ++n) most = fmaxf(most, fmaxf(score[m][n][2 * j], score[m][n][2 * j + 1]));
        most = fmaxf(most, __shfl_xor_sync(full_warp, most, 1));
        most = fmaxf(most, __shfl_xor_sync(full_warp, most, 2));
        const float shift = most == -INFINITY ? 0.0f : most * scale_log2;
        const float factor = exp2_fast(max[m][j] * scale_log2 - shift);
        max[m][j] = most;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < Shape::keys / 8; ++n) {
#pragma unroll
          for (int i = 2 * j; i < 2 * j + 2; ++i) {
            score[m][n][i] = exp2_fast(score[m][n][i] * scale_log2 - shift);
            added += score[m][n][i];
          }
        }
        sum[m][j] = sum[m][j] * factor + added;
#pragma unroll
        for (int d = 0; d < Shape::D / 8; ++d) {
          out[m][d][2 * j] *= factor;
          out[m][d][2 * j + 1] *= factor;
        }
      }
    }
  }

  __device__ void add_up_sums() {
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[m][j] += __shfl_xor_sync(full_warp, sum[m][j], 1);
        sum[m][j] += __shfl_xor_sync(full_warp, sum[m][j], 2);
      }
    }
  }
};

template <typename Shape>
__device__ __forceinline__ void multiply_keys(uint32_t query_rows, uint32_t keys,
                                              float (&score)[Shape::row_tiles][Shape::keys / 8][4]) {
  const int lane = threadIdx.x % 32;
  const uint32_t a_at = query_rows + (lane % 16) * Shape::pitch + (lane / 16) * 16;
  const uint32_t b_at = keys + (lane % 8 + lane / 16 * 8) * Shape::pitch + (lane / 8 % 2) * 16;
#pragma unroll
  for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::keys / 8; ++n) score[m][n][0] = score[m][n][1] = score[m][n][2] = score[m][n][3] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < Shape::D / 16; ++k) {
    uint32_t a[Shape::row_tiles][4];
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) load_matrices(a[m], a_at + m * 16 * Shape::pitch + k * 32);
#pragma unroll
    for (int n = 0; n < Shape::keys / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, b_at + n * 16 * Shape::pitch + k * 32);
#pragma unroll
      for (int m = 0; m < Shape::row_tiles; ++m) {
        mma_16x8x16<typename Shape::T>(score[m][2 * n], a[m], b[0], b[1]);
        mma_16x8x16<typename Shape::T>(score[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void multiply_values(uint32_t values,
                                                const float (&weight)[Shape::row_tiles][Shape::keys / 8][4],
                                                RowState<Shape>& state) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % 32;
  const uint32_t b_at = values + (lane % 16) * Shape::pitch + (lane / 16) * 16;
#pragma unroll
  for (int k = 0; k < Shape::keys / 16; ++k) {
    uint32_t a[Shape::row_tiles][4];
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
      a[m][0] = pack_pair<T>(weight[m][2 * k][0], weight[m][2 * k][1]);
      a[m][1] = pack_pair<T>(weight[m][2 * k][2], weight[m][2 * k][3]);
      a[m][2] = pack_pair<T>(weight[m][2 * k + 1][0], weight[m][2 * k + 1][1]);
      a[m][3] = pack_pair<T>(weight[m][2 * k + 1][2], weight[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < Shape::D / 16; ++d) {
      uint32_t b[4];
      load_matrices_transposed(b, b_at + k * 16 * Shape::pitch + d * 32);
#pragma unroll
      for (int m = 0; m < Shape::row_tiles; ++m) {
        mma_16x8x16<T>(state.out[m][2 * d], a[m], b[0], b[1]);
        mma_16x8x16<T>(state.out[m][2 * d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/** A lane's rows: position in the view and ALiBi slope of each. */
template <typename Shape>
struct LaneRows {
  int position[Shape::row_tiles][2];
  float slope[Shape::row_tiles][2];  // in units of the unscaled score

  __device__ LaneRows(const PrefillParams& p, const PrefillItem& item, int first_row) {
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = first_row + m * 16 + j * 8 + threadIdx.x % 32 / 4;
        const int token = p.token_of(row);
        position[m][j] = item.tile.first_position + token;
        slope[m][j] = 0.0f;
        if (p.slopes != nullptr) {
          slope[m][j] = p.slopes[item.head_begin + row - token * p.packed_heads] * 1.44269504f / p.scale_log2;
        }
      }
    }
  }
};

template <typename Shape>
__device__ __forceinline__ void mask_scores(const PrefillParams& p, const LaneRows<Shape>& rows, int first_key,
                                            float (&score)[Shape::row_tiles][Shape::keys / 8][4]) {
#pragma unroll
  for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::keys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = first_key + n * 8 + threadIdx.x % 4 * 2 + i % 2 - rows.position[m][i / 2];
        score[m][n][i] += rows.slope[m][i / 2] * static_cast<float>(distance);
        if (distance > 0 || (p.window > 0 && distance <= -p.window)) score[m][n][i] = -INFINITY;
      }
    }
  }
}

/** The warp's finished rows, through its own rows of the query buffer, so that stores are 16 bytes wide. */
template <typename Shape>
__device__ void store_rows(const PrefillParams& p, const PrefillItem& item, char* query, int first_row,
                           const RowState<Shape>& state) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float inverse = 1.0f / state.sum[m][j];
      char* to = query + (first_row + m * 16 + j * 8 + lane / 4) * Shape::pitch + lane % 4 * 4;
#pragma unroll
      for (int d = 0; d < Shape::D / 8; ++d) {
        *reinterpret_cast<uint32_t*>(to + d * 16) =
            pack_pair<T>(state.out[m][d][2 * j] * inverse, state.out[m][d][2 * j + 1] * inverse);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < Shape::row_tiles * 16 * Shape::D / 8; i += 32) {
    const int row = first_row + i / (Shape::D / 8);
    const int chunk = i % (Shape::D / 8);
    const int token = p.token_of(row);
    if (token >= item.tile.tokens || chunk * 8 >= p.head_dim) continue;
    T* to = static_cast<T*>(p.y) + row_offset(p, item, token, row - token * p.packed_heads) + chunk * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(query + row * Shape::pitch + chunk * 16);
  }
}

/** The warp's part of a split tile, not yet divided by its sum. */
template <typename Shape>
__device__ void store_part(const PrefillParams& p, const PrefillItem& item, int first_row,
                           const RowState<Shape>& state) {
  const int lane = threadIdx.x % 32;
  const int64_t slot = static_cast<int64_t>(item.tile_index) * p.units() + item.unit;
#pragma unroll
  for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t at = slot * Shape::rows + first_row + m * 16 + j * 8 + lane / 4;
      if (lane % 4 == 0) {
        const float most = state.max[m][j];
        p.states[at] = {most == -INFINITY ? most : most * p.scale_log2, state.sum[m][j]};
      }
      float* to = p.partials + at * Shape::D + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < Shape::D / 8; ++d) {
        *reinterpret_cast<float2*>(to + d * 8) = {state.out[m][d][2 * j], state.out[m][d][2 * j + 1]};
      }
    }
  }
}

template <typename Shape>
__device__ void attend_item(const PrefillParams& p, const PrefillItem& item, char* shared, RowState<Shape>& state) {
  using T = typename Shape::T;
  const int first_row = threadIdx.x / 32 * Shape::row_tiles * 16;
  const uint32_t query = shared_address(shared);
  const uint32_t keys = query + Shape::rows * Shape::pitch;
  const uint32_t values = keys + Shape::keys * Shape::pitch;
  const int key_begin = item.tile.block_begin * key_block;
  const int last = item.tile.first_position + item.tile.tokens - 1;
  const int key_end = min(item.tile.block_end * key_block, last + 1);
  const int64_t from =
      (static_cast<int64_t>(item.kv_head) * p.key_capacity + key_begin + item.tile.key_shift) * Shape::D;
  const T* key_rows = static_cast<const T*>(p.keys) + from;
  const T* value_rows = static_cast<const T*>(p.values) + from;

  fetch_rows<Shape>(keys, key_rows);
  copy_async_commit();
  constexpr int row_pairs = Shape::D / 16;
  constexpr int row_step = threads / row_pairs;
  for (int first = threadIdx.x / row_pairs; first < Shape::rows; first += 2 * row_step) {
    load_queries<T, 2, row_step>(
        p, item, first, threadIdx.x % row_pairs, [&](int row, int chunk, const uint4& values) {
          *reinterpret_cast<uint4*>(shared + row * Shape::pitch + chunk * 16) = values;
        });
  }
  state.reset();
  for (int key = key_begin; key < key_end; key += Shape::keys) {
    float score[Shape::row_tiles][Shape::keys / 8][4];
    copy_async_wait<0>();
    __syncthreads();
    fetch_rows<Shape>(values, value_rows);
    copy_async_commit();
    value_rows += Shape::keys * Shape::D;
    multiply_keys<Shape>(query + first_row * Shape::pitch, keys, score);
    const bool is_inside =
        key + Shape::keys - 1 <= item.tile.first_position && (p.window == 0 || key > last - p.window);
    if (!is_inside || p.slopes != nullptr) mask_scores<Shape>(p, LaneRows<Shape>(p, item, first_row), key, score);
    copy_async_wait<0>();
    __syncthreads();
    key_rows += Shape::keys * Shape::D;
    if (key + Shape::keys < key_end) fetch_rows<Shape>(keys, key_rows);
    copy_async_commit();
    state.add_scores(score, p.scale_log2);
    multiply_values<Shape>(values, score, state);
  }
  state.add_up_sums();
}

template <typename Shape>
__global__ void __launch_bounds__(threads, 2) prefill_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ PrefillItem item;  // here, not in registers, which are short
  __shared__ int is_done;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int tile_count = p.plan->tile_count;
  const int first_row = threadIdx.x / 32 * Shape::row_tiles * 16;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const int next = atomicAdd(&p.plan->next_item, 1);
      is_done = next >= tile_count * p.units();
      if (!is_done) item = prefill_item(p, next, tile_count);
    }
    __syncthreads();
    if (is_done) break;
    RowState<Shape> state;
    attend_item<Shape>(p, item, shared, state);
    if (item.tile.splits == 1) {
      store_rows<Shape>(p, item, shared, first_row, state);
    } else {
      store_part<Shape>(p, item, first_row, state);
    }
  }
}

template <typename Shape>
cudaError_t launch_tiles(const PrefillParams& p, const AttentionArgs& args) {
  const int per_sm = shared_bytes_per_block(args.compute_capability) / (Shape::shared_bytes + 1024) >= 2 ? 2 : 1;
  return launch(prefill_kernel<Shape>, args.sm_count * per_sm, threads, Shape::shared_bytes, args.stream, p);
}

template <typename T>
cudaError_t launch_head_dim(const PrefillParams& p, int padded_dim, const AttentionArgs& args) {
  if (padded_dim == 64) return launch_tiles<PrefillShape<T, 64, 2, 64>>(p, args);
  if (padded_dim == 128) return launch_tiles<PrefillShape<T, 128, 2, 64>>(p, args);
  return launch_tiles<PrefillShape<T, 256, 1, 32>>(p, args);
}

}  // namespace

cudaError_t prefill_tiles(const PrefillParams& p, kvs_dtype dtype, int padded_dim, const AttentionArgs& args) {
  return dtype == KVS_BF16 ? launch_head_dim<__nv_bfloat16>(p, padded_dim, args)
                           : launch_head_dim<__half>(p, padded_dim, args);
}

}  // namespace kvs
