// Prefill attention for Hopper (the structure of FlashAttention-3): one warp feeds keys and values through the tensor
// copy engine, two warpgroups multiply with wgmma.

#include "attention-hopper-consumer.cuh"
#include "launch.cuh"
#include "tensor-map.h"

namespace kvs {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(threads, 1)
    hopper_prefill_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  __shared__ __align__(8) uint64_t barriers[barrier_count];
  __shared__ int items[item_slots];
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
    make_barriers_visible();
  }
  __syncthreads();
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (threadIdx.x < group_threads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < 32) produce<Shape>(p, maps, pipeline);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<Shape>(p, pipeline, shared_query);
  }
#else
  __trap();  // built for another architecture: has_hopper_prefill says no
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------

/** Boxes of (128 rows, 64 columns) of gathered rows of D. */
bool encode_gathered(CUtensorMap* map, const PrefillParams& p, const void* data, int dim, kvs_dtype dtype) {
  const cuuint64_t rows = static_cast<cuuint64_t>(p.kv_head_end - p.kv_head_begin) * p.key_capacity;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(dim), rows};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(dim) * 2};
  const cuuint32_t box[2] = {64, key_block};
  return encode_tensor_map(map, dtype, 2, data, sizes, strides, box);
}

/** Boxes of (block_tokens rows, 64 columns), 128 rows at most, of the layer's values: [block][kv head][token][D]. */
bool encode_in_place(CUtensorMap* map, const AttentionArgs& args) {
  const cuuint64_t row_bytes = args.head_dim * 2;
  const cuuint64_t head_bytes = args.block_tokens * row_bytes;
  const cuuint64_t blocks = 1u << 30;  // ids were checked
  const cuuint64_t sizes[4] = {args.head_dim, args.block_tokens, args.kv_heads, blocks};
  const cuuint64_t strides[3] = {row_bytes, head_bytes, args.block_stride_bytes};
  const cuuint32_t box[4] = {64, args.block_tokens < key_block ? args.block_tokens : key_block, 1, 1};
  return encode_tensor_map(map, args.compute_dtype, 4, args.kv + args.kv_heads * head_bytes, sizes, strides, box);
}

template <typename Shape>
cudaError_t launch_tiles(const PrefillParams& p, kvs_dtype dtype, const AttentionArgs& args) {
  Maps maps;
  const bool is_encoded = encode_gathered(&maps.keys, p, p.keys, Shape::D, dtype) &&
                          (p.values == nullptr ? encode_in_place(&maps.values, args)
                                               : encode_gathered(&maps.values, p, p.values, Shape::D, dtype));
  if (!is_encoded) return cudaErrorInvalidValue;
  return launch(hopper_prefill_kernel<Shape>, args.sm_count, threads, Shape::shared_bytes, args.stream, p, maps);
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
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return has_tensor_maps();
    cudaGetLastError();
    return false;
  }();
  return compute_capability == 90 && padded_dim <= 128 && has_image;
}

bool reads_values_in_place(const AttentionArgs& args) {
  return args.block_tokens >= 16 && args.head_dim == padded_head_dim(args.head_dim) &&
         args.block_stride_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(args.kv) % 16 == 0;
}

cudaError_t prefill_tiles_hopper(const PrefillParams& p, kvs_dtype dtype, int padded_dim, const AttentionArgs& args) {
  return dtype == KVS_BF16 ? launch_head_dim<__nv_bfloat16>(p, dtype, padded_dim, args)
                           : launch_head_dim<__half>(p, dtype, padded_dim, args);
}

}  // namespace kvs
