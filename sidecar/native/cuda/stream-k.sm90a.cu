// Stream-K products for Hopper: the kernel and its launcher.

#include "stream-k.h"

#include "fp8-order.h"
#include "launch.cuh"
#include "stream-k-consumer.cuh"
#include "tensor-map.h"

namespace kvs {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1)
    stream_k_kernel(const __grid_constant__ StreamKParams p, const __grid_constant__ StreamKMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char unaligned[];
  __shared__ __align__(8) uint64_t barriers[2 * Shape::stages];
  const StreamKPipeline<Shape> pipeline{kept((shared_address(unaligned) + 1023) / 1024 * 1024),
                                        kept(shared_address(barriers))};
  if (threadIdx.x == 0) {
    prefetch_map(maps.weight);
    prefetch_map(maps.x);
    pipeline.init();
  }
  __syncthreads();
  const StreamKShares shares(p.total);
  const int begin = shares.begin(blockIdx.x);
  const int end = shares.begin(blockIdx.x + 1);
  if (threadIdx.x >= Shape::consumers) {
    if (threadIdx.x == Shape::consumers) produce<Shape>(p, maps, pipeline, begin, end);
  } else {
    wait_for_previous_kernels();  // what is added to, and the memory of the parts
    consume<Shape>(p, shares, pipeline, begin, end);
  }
#else
  __trap();  // built for another architecture: has_kernel says no
#endif
}

// ---- launcher ---------------------------------------------------------------------------------------------

/** Boxes of (tile_outputs, 128 bytes) of the matrix, in the order that fetch_weight describes. */
template <typename Shape>
bool encode_weight(CUtensorMap* map, const SkinnyProduct& product) {
  const uint32_t value_bytes = Shape::is_fp8 ? 1 : 2;
  const cuuint64_t row_values = Shape::is_fp8 ? fp8_row_bytes(product.inputs) : product.inputs;
  const cuuint64_t row_bytes = row_values * value_bytes;
  const cuuint64_t sizes[4] = {row_values, 8, 2, product.outputs / 16};
  const cuuint64_t neighbours[3] = {2 * row_bytes, row_bytes, 16 * row_bytes};
  const cuuint64_t counterparts[3] = {row_bytes, product.outputs / 2 * row_bytes, 8 * row_bytes};
  const cuuint32_t box[4] = {128 / value_bytes, 8, 2, Shape::tile_outputs / 16};
  return encode_tensor_map(map, product.weight_dtype, 4, product.weight, sizes,
                           product.gated != nullptr ? counterparts : neighbours, box);
}

template <typename Shape>
bool encode_x(CUtensorMap* map, const SkinnyProduct& product) {
  const cuuint64_t sizes[2] = {product.inputs, product.rows};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(product.inputs) * 2};
  const cuuint32_t box[2] = {64, Shape::N};
  return encode_tensor_map(map, product.x_dtype, 2, product.x, sizes, strides, box);
}

template <typename Shape>
cudaError_t launch_shape(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream) {
  StreamKMaps maps;
  if (!encode_weight<Shape>(&maps.weight, product) || !encode_x<Shape>(&maps.x, product)) return cudaErrorInvalidValue;
  StreamKParams p = {};
  p.y = product.y;
  p.scales = product.weight_dtype == KVS_F8E4M3 ? product.scales : nullptr;
  p.bias = product.bias;
  p.gated = product.gated;
  p.parts = static_cast<float*>(device.stream_k_workspace);
  p.rows = static_cast<int>(product.rows);
  p.outputs = static_cast<int>(product.outputs);
  p.pieces = static_cast<int>((product.inputs + Shape::piece_values - 1) / Shape::piece_values);
  p.total = static_cast<int>((product.outputs + Shape::tile_outputs - 1) / Shape::tile_outputs) * p.pieces;
  p.is_accumulating = product.is_accumulating;
  p.is_f32_out = product.y_dtype == KVS_F32;
  const int blocks = p.total < device.sm_count ? p.total : device.sm_count;  // at once: they wait for one another
  return launch(stream_k_kernel<Shape>, blocks, Shape::threads, Shape::shared_bytes, stream, p, maps);
}

template <typename T, bool is_fp8>
cudaError_t launch_rows(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream) {
  if (product.rows <= 8) return launch_shape<StreamKShape<T, 8, is_fp8>>(product, device, stream);
  if (product.rows <= 16) return launch_shape<StreamKShape<T, 16, is_fp8>>(product, device, stream);
  if (product.rows <= 32) return launch_shape<StreamKShape<T, 32, is_fp8>>(product, device, stream);
  if (product.rows <= 48) return launch_shape<StreamKShape<T, 48, is_fp8>>(product, device, stream);
  return launch_shape<StreamKShape<T, 64, is_fp8>>(product, device, stream);
}

bool has_kernel(int compute_capability) {
  static const bool has_image = [] {
    cudaFuncAttributes attributes;
    const void* kernel = reinterpret_cast<const void*>(stream_k_kernel<StreamKShape<__nv_bfloat16, 64, false>>);
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return has_tensor_maps();
    cudaGetLastError();
    return false;
  }();
  return compute_capability == 90 && has_image;
}

}  // namespace

uint64_t stream_k_workspace_bytes(int sm_count, int compute_capability) {
  if (!has_kernel(compute_capability)) return 0;
  using Largest = StreamKShape<__nv_bfloat16, stream_k_rows_max, true>;
  constexpr uint64_t tile_floats = Largest::tile_outputs * Largest::N;
  return static_cast<uint64_t>(sm_count) * 2 * tile_floats * sizeof(float);
}

bool stream_k_supports(const SkinnyProduct& product, const SkinnyDevice& device) {
  const bool is_half = product.x_dtype == KVS_BF16 || product.x_dtype == KVS_F16;
  const bool is_fp8 = product.weight_dtype == KVS_F8E4M3;
  if (!is_half || (product.weight_dtype != product.x_dtype && !is_fp8)) return false;
  if (product.y_dtype != KVS_F32 && (product.y_dtype != product.x_dtype || product.is_accumulating)) return false;
  if (product.rows == 0 || product.rows > stream_k_rows_max) return false;
  if (product.inputs % (is_fp8 ? 16 : 8) != 0 || product.outputs % 16 != 0) return false;
  if (product.gated != nullptr && product.y_dtype != product.x_dtype) return false;
  return has_kernel(device.compute_capability);
}

cudaError_t stream_k_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream) {
  const bool is_fp8 = product.weight_dtype == KVS_F8E4M3;
  if (product.x_dtype == KVS_BF16) {
    return is_fp8 ? launch_rows<__nv_bfloat16, true>(product, device, stream)
                  : launch_rows<__nv_bfloat16, false>(product, device, stream);
  }
  return is_fp8 ? launch_rows<__half, true>(product, device, stream)
                : launch_rows<__half, false>(product, device, stream);
}

}  // namespace kvs
