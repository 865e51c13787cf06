// A prompt's product, its results: bias and gate where the sums lie, then through shared memory, so that rows are
// written in runs of 16 bytes a lane.

#pragma once

#include "prompt-matmul.cuh"

namespace kvs {

/** A lane's sums of 16 rows of its warp: of eight outputs two neighbours of row lane / 4, then of the eighth row on. */
template <int outputs>
using PromptSums = float[outputs / 2];

/** A warp's 16 rows of up to 128 gated values; chunks of 16 bytes, swizzled. */
template <typename Shape>
class PromptStaging {
  using T = typename Shape::T;
  static constexpr int chunks_max = prompt_tile_outputs / 2 / 8;

 public:
  /** first_row: of the warpgroup. */
  __device__ PromptStaging(const PromptParams& p, const PromptPipeline<Shape>& pipeline, int first_row)
      : gated_(static_cast<T*>(p.gated)),
        rows_(p.rows),
        columns_(p.outputs / 2),
        first_row_(first_row + threadIdx.x % 128 / 32 * 16),
        shared_(pipeline.staged(threadIdx.x / 32 - 4)) {}

  /** Two chunks: of the first one rows from 0, from 8, then of the second. */
  __device__ __forceinline__ void put(int chunk, const uint32_t (&values)[4]) const {
    const int lane = threadIdx.x % 32;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     address(lane % 16, chunk + lane / 16)),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
  }

  template <int chunks>
  __device__ __forceinline__ void write(int column) const {
    __syncwarp();
    const int chunk = threadIdx.x % chunks;
#pragma unroll
    for (int i = 0; i < 16 * chunks / 32; ++i) {
      const int row = i * (32 / chunks) + threadIdx.x % 32 / chunks;
      const uint4 values = load_shared_128(address(row, chunk));
      if (first_row_ + row >= rows_ || column + chunk * 8 >= columns_) continue;
      const int64_t at = static_cast<int64_t>(first_row_ + row) * columns_ + column + chunk * 8;
      *reinterpret_cast<uint4*>(gated_ + at) = values;
    }
    __syncwarp();
  }

 private:
  __device__ uint32_t address(int row, int chunk) const {
    return shared_ + row * (chunks_max * 16) + (chunk ^ (row % 8)) * 16;
  }

  T* gated_;
  int rows_;
  int columns_;
  int first_row_;
  uint32_t shared_;
};

// ---- results ------------------------------------------------------------------------------------------------

/** first: of the unit's rows of W, in the order of its tensor map: eights of gates and of what they gate take turns. */
template <typename Shape, int outputs>
__device__ __forceinline__ void add_bias(const PromptParams& p, int first, PromptSums<outputs>& sums) {
  if (p.bias == nullptr) return;
#pragma unroll
  for (int eight = 0; eight < outputs / 8; ++eight) {
    const int row = first + eight * 8 + threadIdx.x % 4 * 2;
    if (row >= p.outputs) continue;
    const int output = row / 16 * 8 + row % 8 + (row / 8 % 2) * (p.outputs / 2);
    const float2 bias = *reinterpret_cast<const float2*>(p.bias + output);
    sums[eight * 4] += bias.x;
    sums[eight * 4 + 1] += bias.y;
    sums[eight * 4 + 2] += bias.x;
    sums[eight * 4 + 3] += bias.y;
  }
}

/** silu(gate) * up of two neighbours. One reciprocal serves both: these, not the additions, are what takes the time.
 * The bound keeps the product of the denominators finite; what it changes is below 1e-16 of up. */
template <typename T>
__device__ __forceinline__ uint32_t gate_pair(const float2& gate, const float2& up) {
  constexpr float minus_log2_e = -1.44269504f;
  constexpr float most = 60.0f;
  const float low = 1.0f + exp2_fast(fminf(gate.x * minus_log2_e, most));
  const float high = 1.0f + exp2_fast(fminf(gate.y * minus_log2_e, most));
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(low * high));
  return pack_pair<T>(gate.x * (inverse * high) * up.x, gate.y * (inverse * low) * up.y);
}

template <typename Shape, int outputs>
__device__ __forceinline__ void store_gated(const PromptParams& p, int first, const PromptStaging<Shape>& staging,
                                            PromptSums<outputs>& sums) {
  add_bias<Shape, outputs>(p, first, sums);
#pragma unroll
  for (int chunk = 0; chunk < outputs / 16; chunk += 2) {
    uint32_t values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* gate = sums + (chunk + i / 2) * 8 + i % 2 * 2;
      values[i] = gate_pair<typename Shape::T>({gate[0], gate[1]}, {gate[4], gate[5]});
    }
    staging.put(chunk, values);
  }
  staging.template write<outputs / 16>(first / 2);
}

}  // namespace kvs
