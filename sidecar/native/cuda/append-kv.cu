// kvs_append_kv: keys are turned by their offset in the block, so that a block can be read at any base position
// (CachedAttention, section 3.4; here split into base and offset). Heads of usual sizes go by 16 bytes a lane, a head
// to a power of two of lanes; the rest, and KV of another type, element by element.

#include <algorithm>

#include "block-reduce.cuh"
#include "device.h"
#include "dtype.h"
#include "launch.cuh"
#include "warp-tensor.cuh"

namespace kvs {

namespace {

constexpr uint32_t threads = 256;
constexpr uint32_t warps = threads / 32;
constexpr uint32_t head_dim_max = 512;

struct AppendKvArgs {
  const float* q_norm;  // may be null
  const float* k_norm;
  float epsilon;
  char* kv;  // of this layer
  uint64_t block_stride_bytes;
  const float* rope_cosine;
  const float* rope_sine;
  DeviceStep step;
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t rotary_dim;
  uint32_t block_tokens;
};

/** Where a head of a row goes, and what happens to it on the way. */
struct HeadPlan {
  const float* norm;  // null: none
  bool is_turned;
  uint32_t offset;  // in the block
  uint64_t to;      // element of q, or of the block's layer
  bool is_q;
  bool is_stored;
  char* layer;  // of the block
};

/** index: q heads, then k heads, then v heads. block: of the row. */
__device__ HeadPlan plan_head(uint32_t row, uint32_t index, int32_t block, const AppendKvArgs& args) {
  HeadPlan plan{};
  plan.is_q = index < args.heads;
  if (plan.is_q) {
    plan.norm = args.q_norm;
    plan.is_stored = true;
    plan.to = (static_cast<uint64_t>(row) * args.heads + index) * args.head_dim;
    return plan;
  }
  const bool is_k = index < args.heads + args.kv_heads;
  const uint32_t position = static_cast<uint32_t>(args.step.row_position[row]);
  plan.norm = is_k ? args.k_norm : nullptr;
  plan.is_turned = is_k && args.rotary_dim != 0;
  plan.offset = position % args.block_tokens;
  plan.is_stored = block >= 0;
  // [K|V][kv head][token][head_dim]: v heads follow k heads in both layouts.
  plan.to = (static_cast<uint64_t>(index - args.heads) * args.block_tokens + plan.offset) * args.head_dim;
  plan.layer = args.kv + static_cast<uint64_t>(max(block, 0)) * args.block_stride_bytes;
  return plan;
}

// ---- 16 bytes a lane -----------------------------------------------------------------------------------------

constexpr uint32_t width = 8;  // values of a lane

/** Pairs (i, i + rotary_dim / 2) of a head spread over lanes of `width` values, turned by the angles of `position`.
 */
template <uint32_t lanes>
__device__ void turn_lanes(float (&values)[width], uint32_t lane, uint32_t position, const AppendKvArgs& args) {
  const uint32_t half_lanes = args.rotary_dim / 2 / width;
  const bool is_first = lane < half_lanes;
  const uint32_t partner = is_first ? lane + half_lanes : lane - half_lanes;
  float others[width];
#pragma unroll
  for (uint32_t k = 0; k < width; ++k) others[k] = __shfl_sync(full_warp, values[k], partner, lanes);
  if (lane >= 2 * half_lanes) return;
  const uint64_t at = static_cast<uint64_t>(position) * (args.rotary_dim / 2) + (is_first ? lane : partner) * width;
  const float sign = is_first ? -1.0f : 1.0f;
#pragma unroll
  for (uint32_t k = 0; k < width; ++k) {
    values[k] = values[k] * args.rope_cosine[at + k] + sign * others[k] * args.rope_sine[at + k];
  }
}

template <uint32_t lanes>
__device__ void norm_lanes(float (&values)[width], uint32_t lane, const float* weight, const AppendKvArgs& args) {
  float squares = 0.0f;
#pragma unroll
  for (uint32_t k = 0; k < width; ++k) squares = fmaf(values[k], values[k], squares);
  for (uint32_t offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(full_warp, squares, offset);
  if (weight == nullptr || lane * width >= args.head_dim) return;
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(args.head_dim) + args.epsilon);
#pragma unroll
  for (uint32_t k = 0; k < width; ++k) values[k] *= scale * weight[lane * width + k];
}

template <class T, uint32_t lanes>
__global__ void __launch_bounds__(threads)
    append_kv_vectors_kernel(T* q, const T* qkv, const __grid_constant__ AppendKvArgs args) {
  let_next_kernel_start();  // it waits for this one, which waits for the one before
  wait_for_previous_kernels();
  const uint32_t row = blockIdx.x;
  const uint32_t head_count = args.heads + 2 * args.kv_heads;
  const uint32_t index = blockIdx.y * (threads / lanes) + threadIdx.x / lanes;
  const uint32_t lane = threadIdx.x % lanes;
  const bool is_in_head = index < head_count && lane * width < args.head_dim;
  const uint64_t from = (static_cast<uint64_t>(row) * head_count + index) * args.head_dim + lane * width;
  Vector<T> vector = is_in_head ? *reinterpret_cast<const Vector<T>*>(qkv + from) : Vector<T>{};
  const int32_t block = args.step.row_block[row];
  if (block < -1) return;  // padding
  // Lanes past the end take part in the shuffles.
  const HeadPlan plan = plan_head(row, min(index, head_count - 1), block, args);
  if (__any_sync(full_warp, plan.norm != nullptr || plan.is_turned)) {
    float values[width];
#pragma unroll
    for (uint32_t k = 0; k < width; ++k) values[k] = is_in_head ? to_float(vector.values[k]) : 0.0f;
    norm_lanes<lanes>(values, lane, plan.norm, args);
    float turned[width];
#pragma unroll
    for (uint32_t k = 0; k < width; ++k) turned[k] = values[k];
    turn_lanes<lanes>(turned, lane, plan.offset, args);
#pragma unroll
    for (uint32_t k = 0; k < width; ++k) vector.values[k] = from_float<T>(plan.is_turned ? turned[k] : values[k]);
  }
  if (!is_in_head || !plan.is_stored) return;
  T* to = (plan.is_q ? q : reinterpret_cast<T*>(plan.layer)) + plan.to + lane * width;
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

// ---- element by element --------------------------------------------------------------------------------------

/** One warp: the head into `head`, RMS-normed when there is a weight. */
template <class T>
__device__ void load_head(float* head, const T* from, const float* norm, uint32_t head_dim, float epsilon) {
  const uint32_t lane = threadIdx.x % 32;
  float squares = 0.0f;
  for (uint32_t i = lane; i < head_dim; i += 32) {
    const float value = to_float(from[i]);
    head[i] = value;
    squares = fmaf(value, value, squares);
  }
  if (norm != nullptr) {
    const float scale = 1.0f / sqrtf(warp_reduce<Sum>(squares) / static_cast<float>(head_dim) + epsilon);
    for (uint32_t i = lane; i < head_dim; i += 32) head[i] *= scale * norm[i];
  }
  __syncwarp();
}

/** One warp: turns pairs (i, i + rotary_dim / 2) by the angles of `position`. */
__device__ void turn_head(float* head, uint32_t position, const AppendKvArgs& args) {
  const uint32_t pairs = args.rotary_dim / 2;
  for (uint32_t i = threadIdx.x % 32; i < pairs; i += 32) {
    const float c = args.rope_cosine[static_cast<uint64_t>(position) * pairs + i];
    const float s = args.rope_sine[static_cast<uint64_t>(position) * pairs + i];
    const float a = head[i];
    const float b = head[i + pairs];
    head[i] = a * c - b * s;
    head[i + pairs] = b * c + a * s;
  }
  __syncwarp();
}

template <class T>
__device__ void store_head(T* to, const float* head, uint32_t head_dim) {
  for (uint32_t i = threadIdx.x % 32; i < head_dim; i += 32) to[i] = from_float<T>(head[i]);
}

template <class T, class Kv>
__global__ void __launch_bounds__(threads)
    append_kv_elements_kernel(T* q, const T* qkv, const __grid_constant__ AppendKvArgs args) {
  __shared__ float heads[warps][head_dim_max];
  let_next_kernel_start();  // it waits for this one, which waits for the one before
  wait_for_previous_kernels();
  const uint32_t row = blockIdx.x;
  const int32_t block = args.step.row_block[row];
  if (block < -1) return;  // padding
  const uint32_t head_count = args.heads + 2 * args.kv_heads;
  const uint32_t index = blockIdx.y * warps + threadIdx.x / 32;
  if (index >= head_count) return;
  float* head = heads[threadIdx.x / 32];
  const HeadPlan plan = plan_head(row, index, block, args);
  const T* from = qkv + (static_cast<uint64_t>(row) * head_count + index) * args.head_dim;
  load_head(head, from, plan.norm, args.head_dim, args.epsilon);
  if (plan.is_turned) turn_head(head, plan.offset, args);
  if (plan.is_q) {
    store_head(q + plan.to, head, args.head_dim);
  } else if (plan.is_stored) {
    store_head(reinterpret_cast<Kv*>(plan.layer) + plan.to, head, args.head_dim);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------

bool has_vectors(const kvs_device_config& c, const void* q, const void* qkv) {
  return c.compute_dtype == c.kv_dtype && c.compute_dtype != KVS_F32 && c.head_dim % width == 0 &&
         c.head_dim <= 32 * width && c.rotary_dim % (2 * width) == 0 && is_aligned(q, 16) && is_aligned(qkv, 16);
}

template <class T>
cudaError_t launch_vectors(T* q, const T* qkv, uint32_t row_count, const AppendKvArgs& args, cudaStream_t stream) {
  const uint32_t head_count = args.heads + 2 * args.kv_heads;
  const auto launch_lanes = [&](auto kernel, uint32_t lanes) {
    const uint32_t heads_of_block = threads / lanes;
    const dim3 grid(row_count, (head_count + heads_of_block - 1) / heads_of_block);
    return launch(kernel, grid, threads, 0, stream, q, qkv, args);
  };
  if (args.head_dim <= 8 * width) return launch_lanes(append_kv_vectors_kernel<T, 8>, 8);
  if (args.head_dim <= 16 * width) return launch_lanes(append_kv_vectors_kernel<T, 16>, 16);
  return launch_lanes(append_kv_vectors_kernel<T, 32>, 32);
}

template <class T, class Kv>
cudaError_t launch_elements(T* q, const T* qkv, uint32_t row_count, const AppendKvArgs& args, cudaStream_t stream) {
  const dim3 grid(row_count, (args.heads + 2 * args.kv_heads + warps - 1) / warps);
  return launch(append_kv_elements_kernel<T, Kv>, grid, threads, 0, stream, q, qkv, args);
}

AppendKvArgs append_kv_args(const kvs_device& d, uint32_t layer, const float* q_norm, const float* k_norm,
                            float epsilon) {
  const kvs_device_config& c = d.config;
  return {q_norm,
          k_norm,
          epsilon,
          d.kv_layer(layer),
          slot_bytes_of(c),
          d.rope_cosine.as<const float>(),
          d.rope_sine.as<const float>(),
          d.step.arrays(),
          c.heads,
          c.kv_heads,
          c.head_dim,
          c.rotary_dim,
          c.block_tokens};
}

}  // namespace
}  // namespace kvs

extern "C" kvs_status kvs_append_kv(kvs_device* device, uint64_t q, uint64_t qkv, uint32_t layer, uint64_t q_norm,
                                    uint64_t k_norm, uint32_t row_count, float epsilon) {
  return kvs::with_device(device, [&](kvs_device& d) {
    kvs::check_step_rows(d, row_count);
    kvs::check_layer(d, layer);
    kvs::require(epsilon >= 0.0f, "append_kv: epsilon must not be negative");
    const kvs_device_config& c = d.config;
    const uint64_t q_size = static_cast<uint64_t>(c.heads) * c.head_dim;
    const uint64_t qkv_size = q_size + 2ull * c.kv_heads * c.head_dim;
    const uint64_t norm_bytes = c.head_dim * sizeof(float);
    char* q_data = d.device_memory(q, d.compute_bytes(row_count, q_size), "q");
    const char* qkv_data = d.device_memory(qkv, d.compute_bytes(row_count, qkv_size), "qkv");
    const float* q_weight = q_norm == 0 ? nullptr : d.device_memory<const float>(q_norm, norm_bytes, "q_norm");
    const float* k_weight = k_norm == 0 ? nullptr : d.device_memory<const float>(k_norm, norm_bytes, "k_norm");
    const kvs::AppendKvArgs args = kvs::append_kv_args(d, layer, q_weight, k_weight, epsilon);
    const bool has_vectors = kvs::has_vectors(c, q_data, qkv_data);
    kvs::with_type(c.compute_dtype, [&](auto type) {
      using T = decltype(type);
      T* to = reinterpret_cast<T*>(q_data);
      const T* from = reinterpret_cast<const T*>(qkv_data);
      cudaError_t error = cudaSuccess;
      if constexpr (sizeof(T) == 2) {
        if (has_vectors) error = kvs::launch_vectors(to, from, row_count, args, d.compute_stream());
      }
      if (!has_vectors) {
        kvs::with_type(c.kv_dtype, [&](auto kv_type) {
          error = kvs::launch_elements<T, decltype(kv_type)>(to, from, row_count, args, d.compute_stream());
        });
      }
      kvs::check_cuda(error, "kvs_append_kv");
    });
  });
}
