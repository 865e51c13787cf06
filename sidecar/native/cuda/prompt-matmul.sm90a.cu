// Gate and up of a prompt on Hopper: the kernel and its launcher.

#include "prompt-matmul.h"

#include <algorithm>

#include "launch.cuh"
#include "prompt-matmul-consumer.cuh"
#include "tensor-map.h"

namespace kvs {
namespace {

/** Blocks of a cluster write to and arrive at each other's shared memory: none before all barriers are there, and none
 * ends before the others. */
template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1)
    prompt_kernel(const __grid_constant__ PromptParams p, const __grid_constant__ PromptMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  __shared__ __align__(8) uint64_t barriers[2 * Shape::stages];
  const PromptPipeline<Shape> pipeline{(shared_address(unaligned) + 1023) / 1024 * 1024, shared_address(barriers)};
  if (threadIdx.x == 0) {
    prefetch_map(maps.weight);
    prefetch_map(maps.x);
    pipeline.init();
  }
  __syncthreads();
  if constexpr (Shape::cluster > 1) cluster_sync();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<Shape>(p, maps, pipeline);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_previous_kernels();  // who still reads what is written
    consume<Shape>(p, pipeline);
  }
  if constexpr (Shape::cluster > 1) cluster_sync();
#else
  __trap();  // built for another architecture: has_kernel says no
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------

/** Boxes of a block's share of half a tile: eight rows of the first half of W and the eight that belong to them, which
 * meet in one lane. */
template <typename Shape>
bool encode_weight(CUtensorMap* map, const SkinnyProduct& product) {
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(product.inputs) * 2;
  const cuuint64_t sizes[4] = {product.inputs, 8, 2, product.outputs / 16};
  const cuuint64_t strides[3] = {row_bytes, product.outputs / 2 * row_bytes, 8 * row_bytes};
  const cuuint32_t box[4] = {Shape::piece_values, 8, 2, Shape::box_outputs / 16};
  return encode_tensor_map(map, product.weight_dtype, 4, product.weight, sizes, strides, box);
}

template <typename Shape>
bool encode_x(CUtensorMap* map, const SkinnyProduct& product) {
  const cuuint64_t sizes[2] = {product.inputs, product.rows};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(product.inputs) * 2};
  const cuuint32_t box[2] = {Shape::piece_values, prompt_tile_rows};
  return encode_tensor_map(map, product.x_dtype, 2, product.x, sizes, strides, box);
}

PromptSchedule schedule_of(const SkinnyProduct& product, int sm_count, int cluster) {
  return PromptSchedule(static_cast<int>(product.rows), static_cast<int>(product.outputs), cluster, sm_count / cluster);
}

/** Two blocks read W once, but take rows by 256. */
int cluster_of(const SkinnyProduct& product, int sm_count, PromptCluster wanted) {
  if (wanted != PromptCluster::fastest) return static_cast<int>(wanted);
  const double alone = schedule_of(product, sm_count, 1).rounds(sm_count);
  const double together = schedule_of(product, sm_count, 2).rounds(sm_count / 2);
  constexpr double gain = 1.05;
  return together <= gain * alone ? 2 : 1;
}

template <typename Shape>
cudaError_t launch_shape(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream) {
  PromptMaps maps;
  if (!encode_weight<Shape>(&maps.weight, product) || !encode_x<Shape>(&maps.x, product)) return cudaErrorInvalidValue;
  PromptParams p = {};
  p.gated = product.gated;
  p.bias = product.bias;
  p.rows = static_cast<int>(product.rows);
  p.outputs = static_cast<int>(product.outputs);
  p.pieces = static_cast<int>((product.inputs + Shape::piece_values - 1) / Shape::piece_values);
  p.schedule = schedule_of(product, device.sm_count, Shape::cluster);
  const int blocks = std::min(p.schedule.units, device.sm_count / Shape::cluster) * Shape::cluster;
  return launch_clusters(prompt_kernel<Shape>, Shape::cluster, blocks, Shape::threads, Shape::shared_bytes, stream, p,
                         maps);
}

template <typename T>
cudaError_t launch_cluster(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream,
                           PromptCluster cluster) {
  if (cluster_of(product, device.sm_count, cluster) == 2) {
    return launch_shape<PromptShape<T, 2>>(product, device, stream);
  }
  return launch_shape<PromptShape<T, 1>>(product, device, stream);
}

bool has_kernel(int compute_capability) {
  static const bool has_image = [] {
    cudaFuncAttributes attributes;
    using Shape = PromptShape<__nv_bfloat16, 2>;
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(prompt_kernel<Shape>)) == cudaSuccess) {
      return has_tensor_maps();
    }
    cudaGetLastError();
    return false;
  }();
  return compute_capability == 90 && has_image;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool prompt_matmul_supports(const SkinnyProduct& product, const SkinnyDevice& device) {
  const bool is_half = product.x_dtype == KVS_BF16 || product.x_dtype == KVS_F16;
  if (!is_half || product.weight_dtype != product.x_dtype || product.y_dtype != product.x_dtype) return false;
  if (product.gated == nullptr || product.is_accumulating) return false;
  if (product.rows == 0 || product.inputs == 0 || product.outputs == 0) return false;
  if (product.inputs % 8 != 0 || product.outputs % 16 != 0) return false;
  if (!is_aligned(product.x) || !is_aligned(product.gated)) return false;
  return device.sm_count >= 2 && has_kernel(device.compute_capability);
}

double prompt_matmul_use(const SkinnyProduct& product, const SkinnyDevice& device, PromptCluster wanted) {
  const int cluster = cluster_of(product, device.sm_count, wanted);
  const int clusters = device.sm_count / cluster;
  const double tiles = static_cast<double>(product.rows) * product.outputs /
                       (static_cast<double>(prompt_tile_rows) * cluster * prompt_tile_outputs);
  return tiles / (clusters * schedule_of(product, device.sm_count, cluster).rounds(clusters));
}

cudaError_t prompt_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream,
                          PromptCluster cluster) {
  return product.x_dtype == KVS_BF16 ? launch_cluster<__nv_bfloat16>(product, device, stream, cluster)
                                     : launch_cluster<__half>(product, device, stream, cluster);
}

}  // namespace kvs
