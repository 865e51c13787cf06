// Prefill attention for Hopper (the structure of FlashAttention-3): one warpgroup feeds keys and values through the
// tensor copy engine, two warpgroups of 64 rows each multiply with wgmma. Within a warpgroup the softmax of one key
// tile runs beside the second product of the tile before; between the two, turns at the tensor cores alternate.

#include "attention-prefill.cuh"
#include "launch.cuh"
#include "warpgroup-tensor.cuh"

namespace kvs {
namespace {

constexpr int group_threads = 128;
constexpr int consumers = 2;
constexpr int threads = (1 + consumers) * group_threads;
constexpr int tile_rows = 128;
constexpr int group_rows = tile_rows / consumers;
constexpr int stages = 2;
constexpr int panel_bytes = 128 * 128;  // 128 rows of 64 values, swizzled
constexpr int item_slots = 2;

template <typename T_, int D_>
struct HopperShape {
  using T = T_;
  static constexpr int D = D_;
  static constexpr int panels = D / 64;
  static constexpr int tile_bytes = panels * panel_bytes;
  static constexpr int shared_bytes = (1 + 2 * stages) * tile_bytes + 1024;
  static constexpr int out_values = D / 2;  // of a lane
};

struct Maps {
  CUtensorMap keys;
  CUtensorMap values;
};

/** Addresses in shared memory. */
struct Pipeline {
  uint32_t query;
  uint32_t keys;
  uint32_t values;
  uint32_t barriers;
  int* items;  // item_slots of them, -1: the end

  __device__ uint32_t keys_full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t keys_empty(int stage) const { return barriers + (stages + stage) * 8; }
  __device__ uint32_t values_full(int stage) const { return barriers + (2 * stages + stage) * 8; }
  __device__ uint32_t values_empty(int stage) const { return barriers + (3 * stages + stage) * 8; }
  __device__ uint32_t item_full(int slot) const { return barriers + (4 * stages + slot) * 8; }
  __device__ uint32_t item_empty(int slot) const { return barriers + (4 * stages + item_slots + slot) * 8; }
};
constexpr int barrier_count = 4 * stages + 2 * item_slots;

/** A place in a ring of `size`, and the parity of the lap. */
template <int size>
struct RingPosition {
  int at = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++at == size) {
      at = 0;
      parity ^= 1;
    }
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- producer -------------------------------------------------------------------------------------------

template <typename Shape>
__device__ void fetch_tile(const CUtensorMap& map, uint32_t to, int row, uint32_t full) {
  mbarrier_expect(full, Shape::tile_bytes);
#pragma unroll
  for (int panel = 0; panel < Shape::panels; ++panel) copy_tile(to + panel * panel_bytes, map, panel * 64, row, full);
}

/** One thread: takes items, fetches their key tiles from the last to the first, keys one tile ahead of values. */
template <typename Shape>
__device__ void produce(const PrefillParams& p, const Maps& maps, const Pipeline& pipeline) {
  RingPosition<item_slots> slot;
  RingPosition<stages> key_stage;
  RingPosition<stages> value_stage;
  const int tile_count = p.plan->tile_count;
  while (true) {
    const int next = atomicAdd(&p.plan->next_item, 1);
    const bool is_end = next >= tile_count * p.units();
    mbarrier_wait(pipeline.item_empty(slot.at), slot.parity ^ 1);
    pipeline.items[slot.at] = is_end ? -1 : next;
    mbarrier_arrive(pipeline.item_full(slot.at));
    slot.advance();
    if (is_end) return;
    const PrefillItem item = prefill_item(p, next, tile_count);
    const int row = item.kv_head * p.key_capacity + item.tile.key_shift;
    for (int block = item.tile.block_end - 1; block >= item.tile.block_begin - 1; --block) {
      if (block >= item.tile.block_begin) {
        mbarrier_wait(pipeline.keys_empty(key_stage.at), key_stage.parity ^ 1);
        fetch_tile<Shape>(maps.keys, pipeline.keys + key_stage.at * Shape::tile_bytes, row + block * key_block,
                          pipeline.keys_full(key_stage.at));
        key_stage.advance();
      }
      if (block + 1 < item.tile.block_end) {
        mbarrier_wait(pipeline.values_empty(value_stage.at), value_stage.parity ^ 1);
        fetch_tile<Shape>(maps.values, pipeline.values + value_stage.at * Shape::tile_bytes,
                          row + (block + 1) * key_block, pipeline.values_full(value_stage.at));
        value_stage.advance();
      }
    }
  }
}

// ---- consumers -------------------------------------------------------------------------------------------

/** Turns at the tensor cores: a warpgroup issues its products, then lets the other one issue. */
__device__ __forceinline__ void take_turn(int group) { named_sync(4 + group, consumers * group_threads); }
__device__ __forceinline__ void pass_turn(int group) { named_arrive(4 + (group ^ 1), consumers * group_threads); }
__device__ __forceinline__ void group_sync(int group) { named_sync(1 + group, group_threads); }

/** 16 bytes of a swizzled tile of 128 rows. */
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return chunk / 8 * panel_bytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

template <typename Shape>
struct GroupState {
  float out[Shape::out_values];
  float max[2];  // rows lane / 4 and lane / 4 + 8 of the warp's 16
  float sum[2];
};

template <typename Shape>
__device__ __forceinline__ void multiply_keys(uint32_t query, uint32_t keys, float (&score)[64]) {
  products_begin();
#pragma unroll
  for (int k = 0; k < Shape::D / 16; ++k) {
    const uint32_t at = k / 4 * panel_bytes + k % 4 * 32;
    multiply_shared<typename Shape::T>(score, tile_descriptor(query + at, 16), tile_descriptor(keys + at, 16), k > 0);
  }
  products_commit();
}

template <typename Shape>
__device__ __forceinline__ void multiply_values(const uint32_t (&weight)[8][4], uint32_t values,
                                                float (&out)[Shape::out_values]) {
  products_begin();
#pragma unroll
  for (int k = 0; k < key_block / 16; ++k) {
    multiply_registers<typename Shape::T>(out, weight[k], tile_descriptor(values + k * 2048, panel_bytes));
  }
  products_commit();
}

/** ALiBi, causal and window bounds; rows are 8 apart. */
__device__ __forceinline__ void mask_scores(const PrefillParams& p, const PrefillItem& item, int first_row,
                                            int first_key, float (&score)[64]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = first_row + j * 8;
    const int token = row / p.packed_heads;
    const int to_first_key = first_key + threadIdx.x % 4 * 2 - item.tile.first_position - token;
    float slope = 0.0f;
    if (p.slopes != nullptr) {
      slope = p.slopes[item.head_begin + row - token * p.packed_heads] * 1.44269504f / p.scale_log2;
    }
    const int lowest = p.window > 0 ? -p.window : INT32_MIN;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int distance = to_first_key + n * 8 + i;
        float& value = score[n * 4 + j * 2 + i];
        value += slope * static_cast<float>(distance);
        if (distance > 0 || distance <= lowest) value = -INFINITY;
      }
    }
  }
}

/** Scores become weights; factor: what the sums and outputs so far shrink by. */
template <typename Shape>
__device__ __forceinline__ void softmax(float (&score)[64], GroupState<Shape>& state, float scale_log2,
                                        float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float most = state.max[j];
#pragma unroll
    for (int n = 0; n < 16; ++n) most = fmaxf(most, fmaxf(score[n * 4 + j * 2], score[n * 4 + j * 2 + 1]));
    most = fmaxf(most, __shfl_xor_sync(full_warp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(full_warp, most, 2));
    const float shift = most == -INFINITY ? 0.0f : most * scale_log2;
    factor[j] = exp2_fast(state.max[j] * scale_log2 - shift);
    state.max[j] = most;
    float added = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = score[n * 4 + j * 2 + i];
        value = exp2_fast(value * scale_log2 - shift);
        added += value;
      }
    }
    state.sum[j] = state.sum[j] * factor[j] + added;
  }
}

template <typename Shape>
__device__ __forceinline__ void pack_weights(const float (&score)[64], uint32_t (&weight)[8][4]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weight[k][i] = pack_pair<typename Shape::T>(score[k * 8 + i * 2], score[k * 8 + i * 2 + 1]);
  }
}

template <typename Shape>
__device__ __forceinline__ void scale_output(GroupState<Shape>& state, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < Shape::out_values; ++i) state.out[i] *= factor[i / 2 % 2];
}

/** Which key tiles of an item no mask touches: (low, high). */
struct PlainTiles {
  int low;
  int high;

  __device__ PlainTiles(const PrefillParams& p, const PrefillItem& item) {
    high = (item.tile.first_position + 1) / key_block;  // tiles below hold no later key than the first row's
    const int last = item.tile.first_position + item.tile.tokens - 1;
    low = p.window > 0 ? max(0, last - p.window + key_block) / key_block : 0;
    if (p.slopes != nullptr) high = 0;
  }
  __device__ bool has(int block) const { return block >= low && block < high; }
};

/** The warpgroup's 64 rows of q, turned, into shared memory. */
template <typename Shape>
__device__ void load_query(const PrefillParams& p, const PrefillItem& item, const Pipeline& pipeline,
                           char* shared_query, int group) {
  constexpr int row_chunks = Shape::D / 8;
#pragma unroll 4
  for (int i = threadIdx.x % group_threads; i < group_rows * row_chunks; i += group_threads) {
    const int row = group * group_rows + i / row_chunks;
    const int chunk = i % row_chunks;
    *reinterpret_cast<uint4*>(shared_query + swizzled(row, chunk)) =
        turned_query_chunk<typename Shape::T>(p, item, row, chunk);
  }
  fence_async_proxy();
  group_sync(group);
}

/** All key tiles of one item. */
template <typename Shape>
__device__ __forceinline__ void attend_item(const PrefillParams& p, const PrefillItem& item, const Pipeline& pipeline,
                                            int group, RingPosition<stages>& key_stage,
                                            RingPosition<stages>& value_stage, GroupState<Shape>& state) {
  const int lane = threadIdx.x % 32;
  const bool is_speaker = lane == 0;  // counts for its warp
  const int first_row = group * group_rows + threadIdx.x % group_threads / 32 * 16 + lane / 4;
  const uint32_t query = pipeline.query + group * group_rows * 128;
  const PlainTiles plain(p, item);
  float score[64];
  uint32_t weight[8][4];
  float factor[2];
  state.max[0] = state.max[1] = -INFINITY;
  state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::out_values; ++i) state.out[i] = 0.0f;

  int block = item.tile.block_end - 1;
  mbarrier_wait(pipeline.keys_full(key_stage.at), key_stage.parity);
  take_turn(group);
  multiply_keys<Shape>(query, pipeline.keys + key_stage.at * Shape::tile_bytes, score);
  pass_turn(group);
  products_wait<0>();
  keep_in_place(score);
  if (is_speaker) mbarrier_arrive(pipeline.keys_empty(key_stage.at));
  key_stage.advance();
  if (!plain.has(block)) mask_scores(p, item, first_row, block * key_block, score);
  softmax<Shape>(score, state, p.scale_log2, factor);
  pack_weights<Shape>(score, weight);

  for (--block; block >= item.tile.block_begin; --block) {
    mbarrier_wait(pipeline.keys_full(key_stage.at), key_stage.parity);
    take_turn(group);
    multiply_keys<Shape>(query, pipeline.keys + key_stage.at * Shape::tile_bytes, score);
    mbarrier_wait(pipeline.values_full(value_stage.at), value_stage.parity);
    multiply_values<Shape>(weight, pipeline.values + value_stage.at * Shape::tile_bytes, state.out);
    pass_turn(group);
    products_wait<1>();
    keep_in_place(score);
    if (is_speaker) mbarrier_arrive(pipeline.keys_empty(key_stage.at));
    key_stage.advance();
    if (!plain.has(block)) mask_scores(p, item, first_row, block * key_block, score);
    softmax<Shape>(score, state, p.scale_log2, factor);
    products_wait<0>();
    keep_in_place(state.out);
    keep_in_place(weight);
    if (is_speaker) mbarrier_arrive(pipeline.values_empty(value_stage.at));
    value_stage.advance();
    scale_output<Shape>(state, factor);
    pack_weights<Shape>(score, weight);
  }
  mbarrier_wait(pipeline.values_full(value_stage.at), value_stage.parity);
  multiply_values<Shape>(weight, pipeline.values + value_stage.at * Shape::tile_bytes, state.out);
  products_wait<0>();
  keep_in_place(state.out);
  if (is_speaker) mbarrier_arrive(pipeline.values_empty(value_stage.at));
  value_stage.advance();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    state.sum[j] += __shfl_xor_sync(full_warp, state.sum[j], 1);
    state.sum[j] += __shfl_xor_sync(full_warp, state.sum[j], 2);
  }
}

/** The warp's 16 finished rows, through their place in the query buffer, so that stores are 16 bytes wide. */
template <typename Shape>
__device__ void store_rows(const PrefillParams& p, const PrefillItem& item, char* shared_query, int warp_row,
                           const GroupState<Shape>& state) {
  using T = typename Shape::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = warp_row + j * 8 + lane / 4;
    const float inverse = 1.0f / state.sum[j];
#pragma unroll
    for (int n = 0; n < Shape::D / 8; ++n) {
      *reinterpret_cast<uint32_t*>(shared_query + swizzled(row, n) + lane % 4 * 4) =
          pack_pair<T>(state.out[n * 4 + j * 2] * inverse, state.out[n * 4 + j * 2 + 1] * inverse);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * Shape::D / 8; i += 32) {
    const int row = warp_row + i / (Shape::D / 8);
    const int chunk = i % (Shape::D / 8);
    const int token = row / p.packed_heads;
    if (token >= item.tile.tokens || chunk * 8 >= p.head_dim) continue;
    T* to = static_cast<T*>(p.y) + row_offset(p, item, token, row - token * p.packed_heads) + chunk * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(shared_query + swizzled(row, chunk));
  }
}

template <typename Shape>
__device__ void store_part(const PrefillParams& p, const PrefillItem& item, int warp_row,
                           const GroupState<Shape>& state) {
  const int lane = threadIdx.x % 32;
  const int64_t slot = static_cast<int64_t>(item.tile_index) * p.units() + item.unit;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int64_t at = slot * tile_rows + warp_row + j * 8 + lane / 4;
    if (lane % 4 == 0) {
      p.states[at] = {state.max[j] == -INFINITY ? -INFINITY : state.max[j] * p.scale_log2, state.sum[j]};
    }
    float* to = p.partials + at * Shape::D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Shape::D / 8; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = {state.out[n * 4 + j * 2], state.out[n * 4 + j * 2 + 1]};
    }
  }
}

template <typename Shape>
__device__ void consume(const PrefillParams& p, const Pipeline& pipeline, char* shared_query, int* is_last) {
  const int group = threadIdx.x / group_threads - 1;
  const int warp_row = threadIdx.x / 32 * 16 - group_rows * consumers / 2;
  RingPosition<item_slots> slot;
  RingPosition<stages> key_stage;
  RingPosition<stages> value_stage;
  const int tile_count = p.plan->tile_count;
  if (group == 1) pass_turn(group);
  while (true) {
    mbarrier_wait(pipeline.item_full(slot.at), slot.parity);
    const int next = pipeline.items[slot.at];
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(pipeline.item_empty(slot.at));
    slot.advance();
    if (next < 0) break;
    const PrefillItem item = prefill_item(p, next, tile_count);
    GroupState<Shape> state;
    group_sync(group);  // the query buffer is free
    load_query<Shape>(p, item, pipeline, shared_query, group);
    attend_item<Shape>(p, item, pipeline, group, key_stage, value_stage, state);
    if (item.tile.splits == 1) {
      group_sync(group);  // all warps have read their queries
      store_rows<Shape>(p, item, shared_query, warp_row, state);
      continue;
    }
    store_part<Shape>(p, item, warp_row, state);
    int* counter = p.counters + ((item.tile_index - item.tile.split) * p.units() + item.unit) * 2 + group;
    finish_split_tile<typename Shape::T, Shape::D, group_threads>(p, item, group * group_rows, (group + 1) * group_rows,
                                                                  tile_rows, counter, is_last + group,
                                                                  [group] { group_sync(group); });
  }
  if (group == 0) take_turn(group);  // the turn that nobody takes
}

#endif

template <typename Shape>
__global__ void __launch_bounds__(threads, 1)
    hopper_prefill_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  __shared__ __align__(8) uint64_t barriers[barrier_count];
  __shared__ int items[item_slots];
  __shared__ int is_last[consumers];
  const uint32_t begin = (shared_address(unaligned) + 1023) / 1024 * 1024;
  char* shared_query = unaligned + (begin - shared_address(unaligned));
  const Pipeline pipeline{begin, begin + Shape::tile_bytes, begin + (1 + stages) * Shape::tile_bytes,
                          shared_address(barriers), items};
  if (threadIdx.x == 0) {
    prefetch_map(maps.keys);
    prefetch_map(maps.values);
    for (int s = 0; s < stages; ++s) {
      mbarrier_init(pipeline.keys_full(s), 1);
      mbarrier_init(pipeline.values_full(s), 1);
      mbarrier_init(pipeline.keys_empty(s), consumers * 4);
      mbarrier_init(pipeline.values_empty(s), consumers * 4);
    }
    for (int s = 0; s < item_slots; ++s) {
      mbarrier_init(pipeline.item_full(s), 1);
      mbarrier_init(pipeline.item_empty(s), consumers * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async_proxy();
  }
  __syncthreads();
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (threadIdx.x < group_threads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<Shape>(p, maps, pipeline);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<Shape>(p, pipeline, shared_query, is_last);
  }
#else
  __trap();  // built for another architecture: has_hopper_prefill says no
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

/** Tiles of (128 rows, 64 columns) of a matrix (rows, D). */
bool encode_map(CUtensorMap* map, void* matrix, uint64_t rows, int dim, kvs_dtype dtype) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(dim), rows};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(dim) * 2};
  const cuuint32_t box[2] = {64, key_block};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type =
      dtype == KVS_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode_tiled()(map, type, 2, matrix, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename Shape>
cudaError_t launch_tiles(const PrefillParams& p, kvs_dtype dtype, const AttentionArgs& args) {
  Maps maps;
  const uint64_t rows = static_cast<uint64_t>(p.kv_head_end - p.kv_head_begin) * p.key_capacity;
  if (!encode_map(&maps.keys, p.keys, rows, Shape::D, dtype) ||
      !encode_map(&maps.values, p.values, rows, Shape::D, dtype)) {
    return cudaErrorInvalidValue;
  }
  return launch(false, hopper_prefill_kernel<Shape>, args.sm_count, threads, Shape::shared_bytes, args.stream, p, maps);
}

template <typename T>
cudaError_t launch_head_dim(const PrefillParams& p, kvs_dtype dtype, int padded_dim, const AttentionArgs& args) {
  if (padded_dim == 64) return launch_tiles<HopperShape<T, 64>>(p, dtype, args);
  return launch_tiles<HopperShape<T, 128>>(p, dtype, args);
}

}  // namespace

bool has_hopper_prefill(int compute_capability, int padded_dim) {
  static const bool has_image = [] {
    cudaFuncAttributes attributes;
    const void* kernel = reinterpret_cast<const void*>(hopper_prefill_kernel<HopperShape<__nv_bfloat16, 128>>);
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return encode_tiled() != nullptr;
    cudaGetLastError();
    return false;
  }();
  return compute_capability == 90 && padded_dim <= 128 && has_image;
}

cudaError_t prefill_tiles_hopper(const PrefillParams& p, kvs_dtype dtype, int padded_dim, const AttentionArgs& args) {
  return dtype == KVS_BF16 ? launch_head_dim<__nv_bfloat16>(p, dtype, padded_dim, args)
                           : launch_head_dim<__half>(p, dtype, padded_dim, args);
}

}  // namespace kvs
