// y = x W^T for few rows of x, bound by the bytes of W: each warp copies 16 rows of W, kilobytes ahead, through a ring
// of shared memory to the tensor cores' wide operand; x, the 8-wide operand, lies in shared memory. A thread block owns
// outputs (of a slice of K when x leaves too little room); its warps take one tile of 16 outputs each, or share the K
// of fewer. Sums are added up in a fixed order.

#include "skinny-matmul.h"

#include "launch.cuh"
#include "skinny-plan.h"
#include "skinny-x.cuh"

namespace kvs {
namespace {

/** sum += the unit's weights by x. */
template <typename Shape>
__device__ __forceinline__ void multiply_unit(const uint4 (&low)[Shape::loads], const uint4 (&high)[Shape::loads],
                                              const LaneX<Shape>& lane_x, int x_at, float (&sum)[Shape::rows_8][4]) {
  constexpr int pairs = Shape::Chunk::values / 2;
#pragma unroll
  for (int j = 0; j < Shape::loads; ++j) {
    uint32_t weight_low[pairs];
    uint32_t weight_high[pairs];
    Shape::Chunk::unpack(low[j], weight_low);
    Shape::Chunk::unpack(high[j], weight_high);
#pragma unroll
    for (int n = 0; n < Shape::rows_8; ++n) {
#pragma unroll
      for (int i = 0; i < pairs / 4; ++i) {
        const uint4 x = lane_x.load(n, x_at, j, i);
        const uint32_t a[4] = {weight_low[4 * i], weight_high[4 * i], weight_low[4 * i + 1], weight_high[4 * i + 1]};
        mma_16x8x16<typename Shape::T>(sum[n], a, x.x, x.y);
        const uint32_t b[4] = {weight_low[4 * i + 2], weight_high[4 * i + 2], weight_low[4 * i + 3],
                               weight_high[4 * i + 3]};
        mma_16x8x16<typename Shape::T>(sum[n], b, x.z, x.w);
      }
    }
  }
}

/** One output after all of K: to y, unless it has a gate. Returns it. */
template <typename T>
__device__ __forceinline__ float store_result(const SkinnyParams& p, int row, int output, float value) {
  if (output >= p.outputs) return 0.0f;
  if (p.scales != nullptr) value *= p.scales[output];
  if (p.bias != nullptr) value += p.bias[output];
  const uint64_t at = static_cast<uint64_t>(row) * p.outputs + output;
  if (p.is_accumulating) {
    atomicAdd(static_cast<float*>(p.y) + at, value);  // once: in memory itself nothing waits for what was there
  } else if (p.is_f32_out) {
    static_cast<float*>(p.y)[at] = value;
  } else if (p.gated == nullptr) {
    static_cast<T*>(p.y)[at] = static_cast<T>(value);
  }
  return value;
}

/** Finished sums of a tile's n-th lower and upper output: to y, gated, or to the partials of the slice. */
template <typename Shape>
__device__ __forceinline__ void emit(const SkinnyParams& p, const BlockWork& work, int tile, int n, int row, float low,
                                     float high) {
  using T = typename Shape::T;
  if (row >= p.rows) return;
  const TileOutputs outputs = work.outputs(p, tile);
  if (p.slices > 1) {
    const int64_t at = static_cast<int64_t>(work.slice) * p.eights + work.item_begin + 2 * tile;
    float* partial = p.partials + (at * p.rows + row) * 8 + n;
    *partial = low;
    if (outputs.has_high) partial[p.rows * 8] = high;
    return;
  }
  const float gate = store_result<T>(p, row, outputs.low + n, low);
  if (!outputs.has_high) return;
  const float up = store_result<T>(p, row, outputs.high + n, high);
  if (p.gated != nullptr) {
    const uint64_t at = static_cast<uint64_t>(row) * (p.outputs / 2) + outputs.low + n;
    static_cast<T*>(p.gated)[at] = static_cast<T>(gate / (1.0f + expf(-gate)) * up);
  }
}

/** For each pair of a lane's sums: f(n-th output of the tile's eights, row, lower sum, upper sum). */
template <typename Shape, typename F>
__device__ __forceinline__ void for_each_sum(const float (&sum)[Shape::rows_8][4], F f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < Shape::rows_8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) f(lane / 4, n * 8 + lane % 4 * 2 + i, sum[n][i], sum[n][2 + i]);
  }
}

/** A warp, over all passes. slot: for sums that warps share. */
template <typename Shape>
__device__ __forceinline__ void multiply_tiles(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place,
                                               const SharedX<Shape>& shared_x, WeightRing<Shape>& ring, float* slot) {
  const LaneX<Shape> lane_x(shared_x, p.rows);
  for (int pass = 0; pass < p.passes; ++pass) {
    const int tile = place.tile_of(p, pass);
    if (tile >= work.tiles) return;
    float sum[Shape::rows_8][4] = {};
    for (int i = 0; i < work.chunks; ++i) {
      const int chunk = work.chunk(i);
      const int units = work.chunk_units(p, chunk);
      int x_at = shared_x.chunk_offset(p, chunk) + place.part * Shape::unit_values * 2;
      shared_x.wait_chunk(chunk);
      for (int unit = place.part; unit < units; unit += p.sharing) {
        uint4 low[Shape::loads];
        uint4 high[Shape::loads];
        ring.take(p, work, place, low, high);
        multiply_unit<Shape>(low, high, lane_x, x_at, sum);
        x_at += p.sharing * Shape::unit_values * 2;
      }
    }
    for_each_sum<Shape>(sum, [&](int n, int row, float low, float high) {
      if (p.sharing == 1) {
        emit<Shape>(p, work, tile, n, row, low, high);
      } else {
        slot[row * tile_outputs + n] = low;
        slot[row * tile_outputs + 8 + n] = high;
      }
    });
  }
}

/** Tiles whose K several warps shared: their parts, in the warps' order. */
template <typename Shape>
__device__ void add_up_shared_tiles(const SkinnyParams& p, const BlockWork& work, const char* rings) {
  constexpr int pairs = Shape::slot_floats / 2;
  for (int i = threadIdx.x; i < work.tiles * pairs; i += skinny_threads) {
    const int tile = i / pairs;
    const int row = i % pairs / 8;
    const int n = i % 8;
    if (row >= p.rows) continue;
    float low = 0.0f;
    float high = 0.0f;
    for (int w = 0; w < p.sharing; ++w) {
      const char* ring = rings + (tile * p.sharing + w) * p.stages * Shape::unit_bytes;
      const float* slot = reinterpret_cast<const float*>(ring) + row * tile_outputs + n;
      low += slot[0];
      high += slot[8];
    }
    emit<Shape>(p, work, tile, n, row, low, high);
  }
}

/** The last of the blocks that share outputs adds up their slices, in order. */
template <typename Shape>
__device__ void add_up_slices(const SkinnyParams& p, const BlockWork& work) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = p.counters + blockIdx.x;
    __threadfence();  // what the block wrote before the barrier, too
    is_last = atomicAdd(counter, 1) == p.slices - 1;
    if (is_last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const int eight_floats = 8 * p.rows;
  const int64_t slice_floats = static_cast<int64_t>(p.eights) * eight_floats;
  for (int i = threadIdx.x; i < work.items * eight_floats; i += skinny_threads) {
    const float* from = p.partials + static_cast<int64_t>(work.item_begin) * eight_floats + i;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < p.slices; ++s) sum += __ldcg(from + s * slice_floats);
    const int eight = i / eight_floats;
    const int at = i - eight * eight_floats;
    store_result<typename Shape::T>(p, at / 8, (work.item_begin + eight) * 8 + at % 8, sum);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(skinny_threads, 1) skinny_kernel(const __grid_constant__ SkinnyParams p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) uint64_t barriers[skinny_chunks_max];
  const BlockWork work(p);
  const WarpPlace place(p);
  const int ring_bytes = p.stages * Shape::unit_bytes;
  char* ring_memory = shared + threadIdx.x / 32 * ring_bytes;
  WeightRing<Shape> ring(p, work, place, ring_memory);  // weights do not depend on the kernels before
  const SharedX<Shape> shared_x(work, shared + skinny_warps * ring_bytes, barriers);
  if (threadIdx.x == 0) shared_x.init();
  __syncthreads();
  wait_for_previous_kernels();
  let_next_kernel_start();
  fetch_x<Shape>(p, work, shared_x);
  // Its ring is empty then, and serves as the warp's slot.
  multiply_tiles<Shape>(p, work, place, shared_x, ring, reinterpret_cast<float*>(ring_memory));
  if (p.sharing > 1) {
    __syncthreads();
    add_up_shared_tiles<Shape>(p, work, shared);
  }
  if (p.slices > 1) add_up_slices<Shape>(p, work);
}

template <typename Shape>
cudaError_t launch_skinny(const SkinnyParams& p, cudaStream_t stream) {
  const int shared_bytes = skinny_warps * p.stages * Shape::unit_bytes + p.x_bytes;
  return launch(skinny_kernel<Shape>, dim3(p.slice_blocks, p.slices), skinny_threads, shared_bytes, stream, p);
}

template <typename T, bool is_fp8>
cudaError_t launch_rows(const SkinnyParams& p, cudaStream_t stream) {
  if (p.rows <= 8 && p.loads == 4) return launch_skinny<SkinnyShape<T, is_fp8, 1, 4>>(p, stream);
  if (p.rows <= 8) return launch_skinny<SkinnyShape<T, is_fp8, 1, 2>>(p, stream);
  if (p.loads == 4) return launch_skinny<SkinnyShape<T, is_fp8, 2, 4>>(p, stream);
  return launch_skinny<SkinnyShape<T, is_fp8, 2, 2>>(p, stream);
}

}  // namespace

cudaError_t skinny_matmul(const SkinnyProduct& product, const SkinnyDevice& device, cudaStream_t stream) {
  SkinnyParams p;
  if (!plan_skinny(p, product, device)) return cudaErrorNotSupported;
  const bool is_fp8 = product.weight_dtype == KVS_F8E4M3;
  if (product.x_dtype == KVS_BF16) {
    return is_fp8 ? launch_rows<__nv_bfloat16, true>(p, stream) : launch_rows<__nv_bfloat16, false>(p, stream);
  }
  return is_fp8 ? launch_rows<__half, true>(p, stream) : launch_rows<__half, false>(p, stream);
}

}  // namespace kvs
