// kvs_append_kv: a warp for each head of each row. Keys are turned by their offset in the block, so that a block can
// be read at any base position (CachedAttention, section 3.4; here split into base and offset).

#include <algorithm>

#include "block-reduce.cuh"
#include "device.h"
#include "dtype.h"

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
    append_kv_kernel(T* q, const T* qkv, const __grid_constant__ AppendKvArgs args) {
  __shared__ float heads[warps][head_dim_max];
  const uint32_t row = blockIdx.x;
  const int32_t sequence = args.step.row_sequence[row];
  if (sequence < 0) return;
  const uint32_t position = static_cast<uint32_t>(args.step.row_position[row]);
  const int32_t block =
      args.step.block_table[args.step.sequences[sequence].table_begin + position / args.block_tokens];
  const uint32_t offset = position % args.block_tokens;
  const uint32_t head_count = args.heads + 2 * args.kv_heads;
  float* head = heads[threadIdx.x / 32];
  for (uint32_t index = blockIdx.y * warps + threadIdx.x / 32; index < head_count; index += gridDim.y * warps) {
    const T* from = qkv + (static_cast<uint64_t>(row) * head_count + index) * args.head_dim;
    const bool is_q = index < args.heads;
    const bool is_k = !is_q && index < args.heads + args.kv_heads;
    load_head(head, from, is_q ? args.q_norm : is_k ? args.k_norm : nullptr, args.head_dim, args.epsilon);
    if (is_q) {
      store_head(q + (static_cast<uint64_t>(row) * args.heads + index) * args.head_dim, head, args.head_dim);
    } else if (block >= 0) {
      if (is_k) turn_head(head, offset, args);
      // [K|V][kv head][token][head_dim]: v heads follow k heads in both layouts.
      Kv* layer = reinterpret_cast<Kv*>(args.kv + static_cast<uint64_t>(block) * args.block_stride_bytes);
      const uint64_t token = static_cast<uint64_t>(index - args.heads) * args.block_tokens + offset;
      store_head(layer + token * args.head_dim, head, args.head_dim);
    }
    __syncwarp();
  }
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
    const kvs::AppendKvArgs args{q_norm == 0 ? nullptr : d.device_memory<const float>(q_norm, norm_bytes, "q_norm"),
                                 k_norm == 0 ? nullptr : d.device_memory<const float>(k_norm, norm_bytes, "k_norm"),
                                 epsilon,
                                 d.kv_layer(layer),
                                 kvs::slot_bytes_of(c),
                                 d.rope_cosine.as<const float>(),
                                 d.rope_sine.as<const float>(),
                                 d.step.arrays(),
                                 c.heads,
                                 c.kv_heads,
                                 c.head_dim,
                                 c.rotary_dim,
                                 c.block_tokens};
    const dim3 grid(row_count, (c.heads + 2 * c.kv_heads + kvs::warps - 1) / kvs::warps);
    kvs::with_type(c.compute_dtype, [&](auto type) {
      kvs::with_type(c.kv_dtype, [&](auto kv_type) {
        using T = decltype(type);
        using Kv = decltype(kv_type);
        kvs::append_kv_kernel<T, Kv><<<grid, kvs::threads, 0, d.compute>>>(
            reinterpret_cast<T*>(q_data), reinterpret_cast<const T*>(qkv_data), args);
      });
    });
    kvs::check_launch("kvs_append_kv");
  });
}
