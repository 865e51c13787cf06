// A prompt's product, its results: bias, gate or addition where the sums lie, then through shared memory, so that rows
// are written in runs of 16 bytes a lane.

#pragma once

#include "prompt-matmul.cuh"

namespace kvs {

/** A lane's sums of 16 rows of its warp: of eight outputs two neighbours of row lane / 4, then of the eighth row on. */
template <int outputs>
using PromptSums = float[outputs / 2];

/** A warp's 16 rows of up to 128 results; chunks of 16 bytes, swizzled. */
template <typename Shape>
class PromptStaging {
  using T = typename Shape::T;
  static constexpr int chunks_max = Shape::staged_outputs / 8;
  static constexpr int rounds_max = 16 * chunks_max / 32;

 public:
  /** first_row: of the warpgroup. */
  __device__ PromptStaging(const PromptParams& p, const PromptPipeline<Shape>& pipeline, int first_row)
      : y_(static_cast<T*>(p.y)),
        rows_(p.rows),
        columns_(Shape::result == PromptResult::gated ? p.outputs / 2 : p.outputs),
        first_row_(first_row + threadIdx.x % 128 / 32 * 16),
        shared_(pipeline.staged(threadIdx.x / 32 - 4)) {}

  /** What 128 results are added to is on its way from here on. */
  __device__ __forceinline__ void ask_for(int column) {
#pragma unroll
    for (int i = 0; i < rounds_max; ++i) {
      const int row = row_of<chunks_max>(i);
      const int chunk = chunk_of<chunks_max>();
      if (is_there(row, column, chunk)) before_[i] = *reinterpret_cast<const uint4*>(at(row, column, chunk));
    }
  }
  /** ... and lies here for load(). */
  __device__ __forceinline__ void put_before() {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < rounds_max; ++i) {
      const uint32_t to = address(row_of<chunks_max>(i), chunk_of<chunks_max>());
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(before_[i].x), "r"(before_[i].y),
                   "r"(before_[i].z), "r"(before_[i].w)
                   : "memory");
    }
    __syncwarp();
  }

  /** Two chunks: of the first one rows from 0, from 8, then of the second. */
  __device__ __forceinline__ void load(int chunk, uint32_t (&values)[4]) const {
    load_matrices(values, matrix_address(chunk));
  }
  __device__ __forceinline__ void put(int chunk, const uint32_t (&values)[4]) const {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(matrix_address(chunk)),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
  }

  template <int chunks>
  __device__ __forceinline__ void write(int column) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * chunks / 32; ++i) {
      const int row = row_of<chunks>(i);
      const int chunk = chunk_of<chunks>();
      uint4 values;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                   : "r"(address(row, chunk))
                   : "memory");
      if (is_there(row, column, chunk)) *reinterpret_cast<uint4*>(at(row, column, chunk)) = values;
    }
    __syncwarp();
  }

 private:
  /** Of the lane in the i-th of the rounds in which the warp reads or writes its rows. */
  template <int chunks>
  __device__ static int row_of(int i) {
    return i * (32 / chunks) + threadIdx.x % 32 / chunks;
  }
  template <int chunks>
  __device__ static int chunk_of() {
    return threadIdx.x % chunks;
  }
  __device__ bool is_there(int row, int column, int chunk) const {
    return first_row_ + row < rows_ && column + chunk * 8 < columns_;
  }
  __device__ T* at(int row, int column, int chunk) const {
    return y_ + static_cast<int64_t>(first_row_ + row) * columns_ + column + chunk * 8;
  }
  __device__ uint32_t address(int row, int chunk) const {
    return shared_ + row * (chunks_max * 16) + (chunk ^ (row % 8)) * 16;
  }
  /** Of the row that the lane names of its matrix. */
  __device__ uint32_t matrix_address(int chunk) const {
    const int lane = threadIdx.x % 32;
    return address(lane % 16, chunk + lane / 16);
  }

  T* y_;
  int rows_;
  int columns_;
  int first_row_;
  uint32_t shared_;
  uint4 before_[rounds_max] = {};
};

// ---- results ------------------------------------------------------------------------------------------------

/** Of the output of a row of a unit's tile of W: eights of gates and of what they gate take turns. */
template <typename Shape>
__device__ __forceinline__ int output_of(const PromptParams& p, int row) {
  if constexpr (Shape::result != PromptResult::gated) return row;
  return row / 16 * 8 + row % 8 + (row / 8 % 2) * (p.outputs / 2);
}

template <typename Shape, int outputs>
__device__ __forceinline__ void add_bias(const PromptParams& p, int first, PromptSums<outputs>& sums) {
  if (p.bias == nullptr) return;
#pragma unroll
  for (int eight = 0; eight < outputs / 8; ++eight) {
    const int row = first + eight * 8 + threadIdx.x % 4 * 2;
    if (row >= p.outputs) continue;
    const float2 bias = *reinterpret_cast<const float2*>(p.bias + output_of<Shape>(p, row));
    sums[eight * 4] += bias.x;
    sums[eight * 4 + 1] += bias.y;
    sums[eight * 4 + 2] += bias.x;
    sums[eight * 4 + 3] += bias.y;
  }
}

/** silu(gate) * up of two neighbours, gate and up rounded first, as where they are stored. One reciprocal serves both:
 * these, not the additions, are what takes the time. The bound keeps the product of the denominators finite; what it
 * changes is below 1e-16 of up. */
template <typename T>
__device__ __forceinline__ uint32_t gate_pair(float gate_low, float gate_high, float up_low, float up_high) {
  constexpr float minus_log2_e = -1.44269504f;
  constexpr float most = 60.0f;
  const float2 gate = unpack_pair<T>(pack_pair<T>(gate_low, gate_high));
  const float2 up = unpack_pair<T>(pack_pair<T>(up_low, up_high));
  const float low = 1.0f + exp2_fast(fminf(gate.x * minus_log2_e, most));
  const float high = 1.0f + exp2_fast(fminf(gate.y * minus_log2_e, most));
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(low * high));
  return pack_pair<T>(gate.x * (inverse * high) * up.x, gate.y * (inverse * low) * up.y);
}

template <typename Shape, int outputs>
__device__ __forceinline__ void store_gated(int first, const PromptStaging<Shape>& staging,
                                            const PromptSums<outputs>& sums) {
  using T = typename Shape::T;
#pragma unroll
  for (int chunk = 0; chunk < outputs / 16; chunk += 2) {
    uint32_t values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* gate = sums + (chunk + i / 2) * 8 + i % 2 * 2;
      values[i] = gate_pair<T>(gate[0], gate[1], gate[4], gate[5]);
    }
    staging.put(chunk, values);
  }
  staging.template write<outputs / 16>(first / 2);
}

template <typename Shape, int outputs>
__device__ __forceinline__ void store_plain(int first, PromptStaging<Shape>& staging,
                                            const PromptSums<outputs>& sums) {
  using T = typename Shape::T;
  constexpr bool is_adding = Shape::result == PromptResult::added;
  constexpr int chunks = Shape::staged_outputs / 8;
#pragma unroll
  for (int part = 0; part < outputs / Shape::staged_outputs; ++part) {
    const int column = first + part * Shape::staged_outputs;
    if constexpr (is_adding) {
      staging.put_before();
      if (part + 1 < outputs / Shape::staged_outputs) staging.ask_for(column + Shape::staged_outputs);
    }
#pragma unroll
    for (int chunk = 0; chunk < chunks; chunk += 2) {
      uint32_t values[4];
      if constexpr (is_adding) staging.load(chunk, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* sum = sums + (part * chunks + chunk + i / 2) * 4 + i % 2 * 2;
        const float2 before = is_adding ? unpack_pair<T>(values[i]) : float2{0, 0};
        values[i] = pack_pair<T>(sum[0] + before.x, sum[1] + before.y);
      }
      staging.put(chunk, values);
    }
    staging.template write<chunks>(column);
  }
}

/** first: of the unit's rows of W, in the order of its tensor map. */
template <typename Shape, int outputs>
__device__ __forceinline__ void store_sums(const PromptParams& p, int first, PromptStaging<Shape>& staging,
                                           PromptSums<outputs>& sums) {
  add_bias<Shape, outputs>(p, first, sums);
  if constexpr (Shape::result == PromptResult::gated) {
    store_gated<Shape, outputs>(first, staging, sums);
  } else {
    store_plain<Shape, outputs>(first, staging, sums);
  }
}

}  // namespace kvs
