// Attention in plain F32 arithmetic, for any type and size: the oracle of the fast kernels, and what serves where
// they do not. One block for each row and head; its warps take turns at the keys, each with a softmax of its own,
// merged at the end.

#include "attention.h"
#include "block-reduce.cuh"
#include "dtype.h"

namespace kvs {

namespace {

constexpr uint32_t threads = 128;
constexpr uint32_t warps = threads / 32;
constexpr uint32_t head_dim_max = 512;
constexpr uint32_t lane_dims = head_dim_max / 32;

/** All threads: turned = R(position - base) q. */
__device__ void turn_query(float* turned, const float* q, uint32_t angle, const AttentionArgs& args) {
  const uint32_t pairs = args.rotary_dim / 2;
  const uint64_t at = static_cast<uint64_t>(angle) * pairs;
  for (uint32_t i = threadIdx.x; i < args.head_dim; i += threads) {
    float value = q[i];
    if (i < pairs) {
      value = q[i] * args.rope_cosine[at + i] - q[i + pairs] * args.rope_sine[at + i];
    } else if (i < 2 * pairs) {
      value = q[i] * args.rope_cosine[at + i - pairs] + q[i - pairs] * args.rope_sine[at + i - pairs];
    }
    turned[i] = value;
  }
}

/** One warp's running softmax: weights are relative to `most`. */
struct Running {
  float most = -INFINITY;
  float total = 0.0f;
  float sums[lane_dims] = {};  // of dims lane, lane + 32, ...

  template <class Kv>
  __device__ void add(float score, const Kv* value, uint32_t head_dim) {
    const float next = fmaxf(most, score);
    const float keep = expf(most - next);
    const float weight = expf(score - next);
    most = next;
    total = total * keep + weight;
#pragma unroll
    for (uint32_t j = 0; j < lane_dims; ++j) {
      const uint32_t i = j * 32 + threadIdx.x % 32;
      if (i < head_dim) sums[j] = sums[j] * keep + weight * to_float(value[i]);
    }
  }
};

template <class Kv>
__device__ float dot(const float* q, const Kv* key, uint32_t head_dim) {
  float sum = 0.0f;
  for (uint32_t i = threadIdx.x % 32; i < head_dim; i += 32) sum = fmaf(q[i], to_float(key[i]), sum);
  return warp_reduce<Sum>(sum);
}

/** All threads: y = the warps' softmaxes as one. */
template <class T>
__device__ void merge(T* y, const Running& running, float (*sums)[head_dim_max], uint32_t head_dim) {
  __shared__ float mosts[warps];
  __shared__ float totals[warps];
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  if (lane == 0) {
    mosts[warp] = running.most;
    totals[warp] = running.total;
  }
#pragma unroll
  for (uint32_t j = 0; j < lane_dims; ++j) {
    if (j * 32 + lane < head_dim) sums[warp][j * 32 + lane] = running.sums[j];
  }
  __syncthreads();
  float most = -INFINITY;
  for (uint32_t w = 0; w < warps; ++w) most = fmaxf(most, mosts[w]);
  float total = 0.0f;
  for (uint32_t w = 0; w < warps; ++w) total += totals[w] * expf(mosts[w] - most);
  for (uint32_t i = threadIdx.x; i < head_dim; i += threads) {
    float sum = 0.0f;
    for (uint32_t w = 0; w < warps; ++w) sum += sums[w][i] * expf(mosts[w] - most);
    y[i] = from_float<T>(sum / total);
  }
}

template <class T, class Kv>
__global__ void __launch_bounds__(threads) simple_attention_kernel(const __grid_constant__ AttentionArgs args) {
  __shared__ float q[head_dim_max];
  __shared__ float turned[head_dim_max];
  __shared__ float sums[warps][head_dim_max];
  const uint32_t row = blockIdx.x;
  const uint32_t head = blockIdx.y;
  const uint64_t at = (static_cast<uint64_t>(row) * args.heads + head) * args.head_dim;
  T* y = static_cast<T*>(args.y) + at;
  const int32_t sequence = args.step.row_sequence[row];
  if (sequence < 0) {
    for (uint32_t i = threadIdx.x; i < args.head_dim; i += threads) y[i] = from_float<T>(0.0f);
    return;
  }
  for (uint32_t i = threadIdx.x; i < args.head_dim; i += threads)
    q[i] = to_float(static_cast<const T*>(args.q)[at + i]);
  const uint32_t position = static_cast<uint32_t>(args.step.row_position[row]);
  const uint32_t first = args.window != 0 && position >= args.window ? position - args.window + 1 : 0;
  const int32_t* table = args.step.block_table + args.step.sequences[sequence].table_begin;
  const float slope = args.alibi_slopes == nullptr ? 0.0f : args.alibi_slopes[head];
  const uint64_t head_elements = static_cast<uint64_t>(args.block_tokens) * args.head_dim;
  const uint32_t kv_head = head / (args.heads / args.kv_heads);
  Running running;
  for (uint32_t j = first / args.block_tokens; j <= position / args.block_tokens; ++j) {
    const uint32_t base = j * args.block_tokens;
    __syncthreads();
    turn_query(turned, q, position - base, args);
    __syncthreads();
    const Kv* keys =
        reinterpret_cast<const Kv*>(args.kv + static_cast<uint64_t>(table[j]) * args.block_stride_bytes) +
        kv_head * head_elements;
    const Kv* values = keys + args.kv_heads * head_elements;
    for (uint32_t o = threadIdx.x / 32; o < args.block_tokens && base + o <= position; o += warps) {
      if (base + o < first) continue;
      const uint64_t token = static_cast<uint64_t>(o) * args.head_dim;
      const float distance = static_cast<float>(base + o) - static_cast<float>(position);
      running.add(args.scale * dot(turned, keys + token, args.head_dim) + slope * distance, values + token,
                  args.head_dim);
    }
  }
  merge(y, running, sums, args.head_dim);
}

}  // namespace

cudaError_t simple_attention(const AttentionArgs& args) {
  const dim3 grid(args.row_count, args.heads);
  with_type(args.compute_dtype, [&](auto type) {
    with_type(args.kv_dtype, [&](auto kv_type) {
      using T = decltype(type);
      using Kv = decltype(kv_type);
      simple_attention_kernel<T, Kv><<<grid, threads, 0, args.stream>>>(args);
    });
  });
  return cudaGetLastError();
}

}  // namespace kvs
