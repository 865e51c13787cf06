// y = x W^T for few rows of x, bound by the bytes of W: each warp streams 16 rows of W from memory right into the
// registers of the tensor cores' wide operand, several kilobytes ahead, while x waits in shared memory as the 8-wide
// one. A thread block owns whole tiles of 16 outputs, or of a slice of K when tiles are few or x is large; its warps
// share their K evenly, and sums are added up in a fixed order.

#include "skinny-matmul.h"

#include <algorithm>

#include "launch.cuh"
#include "skinny-matmul.cuh"

namespace kvs {
namespace {

constexpr int tile_outputs = 16;
constexpr int rows_max = 32;
constexpr int slices_max = 8;
constexpr int tiles_max = 16384;            // counters
constexpr int sliced_floats_max = 4 << 20;  // partials

template <typename T_, bool is_fp8_, int rows_8_>
struct SkinnyShape {
  using T = T_;
  using Chunk = WeightChunk<T_, is_fp8_>;
  static constexpr bool is_fp8 = is_fp8_;
  static constexpr int rows_8 = rows_8_;
  static constexpr int rows = rows_8 * 8;
  static constexpr int warps = 16;
  static constexpr int threads = warps * 32;
  static constexpr int chunks = 4;                                // of 16 bytes, per lane and output
  static constexpr int unit_values = 4 * chunks * Chunk::values;  // of K, that a warp loads at once
  static constexpr int x_padding = is_fp8 ? 16 : 64;              // bytes after a row of x: no bank conflicts
  static constexpr int slot_floats = tile_outputs * rows;
  static constexpr int slot_bytes = warps * 2 * slot_floats * 4;
};

/** Contiguous shares of `total`: part i of `parts` begins at begin(i). */
__device__ __forceinline__ int share_begin(int total, int parts, int i) {
  return static_cast<int>(static_cast<int64_t>(total) * i / parts);
}
__device__ __forceinline__ int share_owner(int total, int parts, int at) {
  int owner = static_cast<int>((static_cast<int64_t>(at) * parts) / total);
  while (share_begin(total, parts, owner + 1) <= at) ++owner;
  return owner;
}

/** What a thread block works on. */
struct BlockWork {
  int slice;
  int k_begin;  // units
  int k_units;
  int tile_begin;
  int tiles;

  __device__ explicit BlockWork(const SkinnyParams& p) {
    slice = blockIdx.x / p.slice_blocks;
    const int block = blockIdx.x % p.slice_blocks;
    k_begin = share_begin(p.k_units, p.slices, slice);
    k_units = share_begin(p.k_units, p.slices, slice + 1) - k_begin;
    tile_begin = share_begin(p.tiles, p.slice_blocks, block);
    tiles = share_begin(p.tiles, p.slice_blocks, block + 1) - tile_begin;
  }
};

/** Where in the block's (tile, unit of K) a warp's loads are. */
template <typename Shape>
struct WeightStream {
  const char* base;      // of the lane: its output of tile 0 of the block, its bytes of the slice's first unit
  uint64_t tile_bytes;   // from tile to tile
  uint32_t eight_bytes;  // from an output to the one 8 further
  int tile;
  int unit;
  int left;
  int last_tile;        // the tile that may hang over the last output
  uint32_t last_shift;  // what to go back by there
  uint32_t last_shift_8;

  __device__ WeightStream(const SkinnyParams& p, const BlockWork& work, int begin, int count) {
    const int lane = threadIdx.x % 32;
    constexpr int value_bytes = Shape::is_fp8 ? 1 : 2;
    const uint64_t row_bytes = static_cast<uint64_t>(p.inputs) * value_bytes;
    const int output = work.tile_begin * tile_outputs + lane / 4;
    base = static_cast<const char*>(p.weight) + output * row_bytes +
           static_cast<uint64_t>(work.k_begin) * Shape::unit_values * value_bytes + lane % 4 * 16;
    tile_bytes = row_bytes * tile_outputs;
    eight_bytes = static_cast<uint32_t>(row_bytes * 8);
    tile = begin / work.k_units;
    unit = begin - tile * work.k_units;
    left = count;
    last_tile = p.outputs % tile_outputs == 0 ? -1 : p.outputs / tile_outputs - work.tile_begin;
    const int valid = p.outputs % tile_outputs;
    last_shift = static_cast<uint32_t>(max(0, lane / 4 - valid + 1) * row_bytes);
    last_shift_8 = static_cast<uint32_t>(max(0, lane / 4 + 8 - valid + 1) * row_bytes);
  }

  __device__ __forceinline__ void load(const BlockWork& work, uint4 (&low)[Shape::chunks],
                                       uint4 (&high)[Shape::chunks]) {
    if (left == 0) return;
    const char* from = base + tile * tile_bytes + static_cast<uint32_t>(unit) * (Shape::chunks * 64);
    const char* from_8 = from + eight_bytes;
    if (tile == last_tile) {  // outputs past the end: the last one again
      from -= last_shift;
      from_8 -= last_shift_8;
    }
#pragma unroll
    for (int j = 0; j < Shape::chunks; ++j) {
      low[j] = load_streaming(from + j * 64);
      high[j] = load_streaming(from_8 + j * 64);
    }
    --left;
    if (++unit == work.k_units) {
      unit = 0;
      ++tile;
    }
  }
};

/** sum += the unit's weights by x; x_at: the lane's values of the unit's first chunk, in its row of x. */
template <typename Shape>
__device__ __forceinline__ void multiply_unit(const uint4 (&low)[Shape::chunks], const uint4 (&high)[Shape::chunks],
                                              const char* x_at, int x_pitch, int rows, float (&sum)[Shape::rows_8][4]) {
  constexpr int pairs = Shape::Chunk::values / 2;
  const int group = threadIdx.x % 32 / 4;
#pragma unroll
  for (int j = 0; j < Shape::chunks; ++j) {
    uint32_t weight_low[pairs];
    uint32_t weight_high[pairs];
    Shape::Chunk::unpack(low[j], weight_low);
    Shape::Chunk::unpack(high[j], weight_high);
#pragma unroll
    for (int n = 0; n < Shape::rows_8; ++n) {
      uint32_t x[pairs];
#pragma unroll
      for (int i = 0; i < pairs / 4; ++i) {
        uint4 part = {0, 0, 0, 0};
        if (n * 8 + group < rows) {
          part = *reinterpret_cast<const uint4*>(x_at + n * 8 * x_pitch + j * Shape::Chunk::values * 8 + i * 16);
        }
        x[4 * i] = part.x;
        x[4 * i + 1] = part.y;
        x[4 * i + 2] = part.z;
        x[4 * i + 3] = part.w;
      }
#pragma unroll
      for (int i = 0; i < pairs; i += 2) {
        const uint32_t a[4] = {weight_low[i], weight_high[i], weight_low[i + 1], weight_high[i + 1]};
        mma_16x8x16<typename Shape::T>(sum[n], a, x[i], x[i + 1]);
      }
    }
  }
}

/** Copies the slice of x into shared memory. */
template <typename Shape>
__device__ void load_x(const SkinnyParams& p, const BlockWork& work, char* x, int x_pitch) {
  const int row_chunks = work.k_units * Shape::unit_values / 8;
  const char* from = static_cast<const char*>(p.x) + static_cast<uint64_t>(work.k_begin) * Shape::unit_values * 2;
  for (int row = 0; row < p.rows; ++row) {
    for (int i = threadIdx.x; i < row_chunks; i += Shape::threads) {
      copy_async_16(shared_address(x + row * x_pitch + i * 16), from + i * 16, true);
    }
    from += static_cast<uint64_t>(p.inputs) * 2;
  }
  copy_async_commit();
  copy_async_wait<0>();
}

/** A finished sum of a tile (16 outputs, row) of the block: to y, or to the partials of the slice. */
template <typename Shape>
__device__ __forceinline__ void emit(const SkinnyParams& p, const BlockWork& work, int tile, int output, int row,
                                     float value) {
  if (p.slices == 1) {
    store_result<typename Shape::T>(p, row, (work.tile_begin + tile) * tile_outputs + output, value);
  } else if (row < p.rows) {
    const uint64_t tile_of_all = static_cast<uint64_t>(work.slice) * p.tiles + work.tile_begin + tile;
    p.partials[(tile_of_all * p.rows + row) * tile_outputs + output] = value;
  }
}

/** For each of a lane's sums: f(output of the tile, row, sum). */
template <typename Shape, typename F>
__device__ __forceinline__ void for_each_sum(const float (&sum)[Shape::rows_8][4], F f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < Shape::rows_8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2, sum[n][i]);
  }
}

/** Tiles whose K several warps shared: their parts, in the warps' order. */
template <typename Shape>
__device__ void add_up_shared_tiles(const SkinnyParams& p, const BlockWork& work, const float* slots) {
  const int units = work.tiles * work.k_units;
  for (int i = threadIdx.x; i < work.tiles * Shape::slot_floats; i += Shape::threads) {
    const int tile = i / Shape::slot_floats;
    const int at = i % Shape::slot_floats;
    const int first = share_owner(units, Shape::warps, tile * work.k_units);
    const int last = share_owner(units, Shape::warps, (tile + 1) * work.k_units - 1);
    if (first == last || at / tile_outputs >= p.rows) continue;
    float sum = slots[(first * 2 + 1) * Shape::slot_floats + at];
    for (int w = first + 1; w <= last; ++w) {
      if (share_begin(units, Shape::warps, w) == share_begin(units, Shape::warps, w + 1)) continue;  // it had nothing
      sum += slots[w * 2 * Shape::slot_floats + at];
    }
    emit<Shape>(p, work, tile, at % tile_outputs, at / tile_outputs, sum);
  }
}

/** The last block to finish a tile adds up the slices, in order. */
template <typename Shape>
__device__ void add_up_slices(const SkinnyParams& p, const BlockWork& work, int* is_last) {
  __threadfence();
  __syncthreads();
  for (int t = threadIdx.x; t < work.tiles; t += Shape::threads) {
    int* counter = p.counters + work.tile_begin + t;
    is_last[t] = atomicAdd(counter, 1) == p.slices - 1;
    if (is_last[t]) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  const int tile_floats = tile_outputs * p.rows;
  for (int i = threadIdx.x; i < work.tiles * tile_floats; i += Shape::threads) {
    const int tile = i / tile_floats;
    if (!is_last[tile]) continue;
    const int at = i % tile_floats;
    const float* from = p.partials + static_cast<uint64_t>(work.tile_begin + tile) * tile_floats + at;
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < p.slices; ++s) sum += __ldcg(from + static_cast<uint64_t>(s) * p.tiles * tile_floats);
    store_result<typename Shape::T>(p, at / tile_outputs, (work.tile_begin + tile) * tile_outputs + at % tile_outputs,
                                    sum);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, 1) skinny_kernel(const __grid_constant__ SkinnyParams p) {
  extern __shared__ __align__(128) char shared[];
  const BlockWork work(p);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int units = work.tiles * work.k_units;
  const int begin = share_begin(units, Shape::warps, warp);
  const int end = share_begin(units, Shape::warps, warp + 1);
  float* slots = reinterpret_cast<float*>(shared);
  int* is_last = reinterpret_cast<int*>(shared + Shape::slot_bytes);
  char* x = shared + Shape::slot_bytes + (p.slices > 1 ? (work.tiles * 4 + 127) / 128 * 128 : 0);
  const int x_pitch = work.k_units * Shape::unit_values * 2 + Shape::x_padding;

  uint4 low[2][Shape::chunks];
  uint4 high[2][Shape::chunks];
  WeightStream<Shape> stream(p, work, begin, end - begin);
  stream.load(work, low[0], high[0]);  // weights do not depend on the kernels before
  stream.load(work, low[1], high[1]);
  wait_for_previous_kernels();
  let_next_kernel_start();
  load_x<Shape>(p, work, x, x_pitch);
  __syncthreads();

  const char* x_lane = x + lane / 4 * x_pitch + lane % 4 * Shape::Chunk::values * 2;
  int tile = begin / work.k_units;
  int unit = begin - tile * work.k_units;
  int run_begin = unit;
  float sum[Shape::rows_8][4] = {};
  for (int at = begin; at < end; at += 2) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (at + b >= end) break;
      multiply_unit<Shape>(low[b], high[b], x_lane + unit * Shape::unit_values * 2, x_pitch, p.rows, sum);
      stream.load(work, low[b], high[b]);
      ++unit;
      const bool is_tile_end = unit == work.k_units;
      if (!is_tile_end && at + b + 1 < end) continue;
      if (is_tile_end && run_begin == 0) {
        for_each_sum<Shape>(sum, [&](int output, int row, float s) { emit<Shape>(p, work, tile, output, row, s); });
      } else {
        float* slot = slots + (warp * 2 + (run_begin == 0 ? 1 : 0)) * Shape::slot_floats;
        for_each_sum<Shape>(sum, [&](int output, int row, float s) { slot[row * tile_outputs + output] = s; });
      }
#pragma unroll
      for (int n = 0; n < Shape::rows_8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
      if (is_tile_end) {
        unit = 0;
        ++tile;
      }
      run_begin = unit;
    }
  }
  __syncthreads();
  add_up_shared_tiles<Shape>(p, work, slots);
  if (p.slices > 1) add_up_slices<Shape>(p, work, is_last);
}

// ---- launcher ----------------------------------------------------------------------------------------------

int unit_values_of(const SkinnyMatmulArgs& args) { return args.weight_dtype == KVS_F8E4M3 ? 256 : 128; }

/** Room for x in shared memory, beside the sums that warps share and flags of tiles. */
uint64_t x_bytes_max(const SkinnyMatmulArgs& args) {
  const int slots = (args.rows <= 8 ? 1 : args.rows <= 16 ? 2 : 4) * 16 * 1024;
  return static_cast<uint64_t>(shared_bytes_per_block(args.compute_capability) - slots - 6 * 1024);
}

/** Bytes that the busiest SM moves with K in so many slices, the rest of its cost in bytes' worth of time; 0:
 * impossible. */
uint64_t cost_of_slices(const SkinnyMatmulArgs& args, int slices) {
  const uint64_t tiles = (args.outputs + tile_outputs - 1) / tile_outputs;
  const uint64_t k_units = args.inputs / unit_values_of(args);
  const uint64_t blocks = std::min<uint64_t>(args.sm_count / slices, tiles);
  const uint64_t slice_values = (k_units + slices - 1) / slices * unit_values_of(args);
  const uint64_t x_bytes = args.rows * (slice_values * 2 + 64);
  const uint64_t tiles_each = (tiles + blocks - 1) / blocks;
  if (k_units < static_cast<uint64_t>(slices) || x_bytes > x_bytes_max(args)) return 0;
  if (slices > 1 && (tiles > tiles_max || slices * tiles * args.rows * tile_outputs > sliced_floats_max)) return 0;
  const uint64_t weight_bytes = tiles_each * tile_outputs * slice_values * (args.weight_dtype == KVS_F8E4M3 ? 1 : 2);
  const uint64_t partial_bytes = slices > 1 ? tiles_each * tile_outputs * args.rows * 8 + 40 * 1024 : 0;
  return weight_bytes + x_bytes / 2 + partial_bytes;
}

int best_slices(const SkinnyMatmulArgs& args) {
  int best = 0;
  uint64_t least = 0;
  for (int slices = 1; slices <= slices_max; ++slices) {
    const uint64_t cost = cost_of_slices(args, slices);
    if (cost != 0 && (best == 0 || cost < least)) {
      best = slices;
      least = cost;
    }
  }
  return best;
}

template <typename Shape>
cudaError_t launch_skinny(const SkinnyParams& p, const SkinnyMatmulArgs& args) {
  const int k_units = (p.k_units + p.slices - 1) / p.slices;
  const int x_bytes = p.rows * (k_units * Shape::unit_values * 2 + Shape::x_padding);
  const int tiles = (p.tiles + p.slice_blocks - 1) / p.slice_blocks;
  const int bytes = Shape::slot_bytes + x_bytes + (p.slices > 1 ? (tiles * 4 + 127) / 128 * 128 : 0);
  if (bytes > shared_bytes_per_block(args.compute_capability)) return cudaErrorNotSupported;
  return launch(true, skinny_kernel<Shape>, p.slices * p.slice_blocks, Shape::threads, bytes, args.stream, p);
}

template <typename T, bool is_fp8>
cudaError_t launch_rows(const SkinnyParams& p, const SkinnyMatmulArgs& args) {
  if (p.rows <= 8) return launch_skinny<SkinnyShape<T, is_fp8, 1>>(p, args);
  if (p.rows <= 16) return launch_skinny<SkinnyShape<T, is_fp8, 2>>(p, args);
  return launch_skinny<SkinnyShape<T, is_fp8, 4>>(p, args);
}

}  // namespace

uint64_t skinny_matmul_workspace_bytes(int) { return tiles_max * 4 + sliced_floats_max * 4ull; }

bool skinny_matmul_supports(const SkinnyMatmulArgs& args) {
  const bool is_half = args.x_dtype == KVS_BF16 || args.x_dtype == KVS_F16;
  return is_half && (args.weight_dtype == args.x_dtype || args.weight_dtype == KVS_F8E4M3) && args.rows > 0 &&
         args.rows <= rows_max && args.inputs % unit_values_of(args) == 0 && args.compute_capability >= 80 &&
         (args.y_dtype == args.x_dtype || args.y_dtype == KVS_F32) && best_slices(args) != 0;
}

cudaError_t skinny_matmul(const SkinnyMatmulArgs& args) {
  if (!skinny_matmul_supports(args)) return cudaErrorNotSupported;
  SkinnyParams p = {};
  p.y = args.y;
  p.x = args.x;
  p.weight = args.weight;
  p.scales = args.weight_dtype == KVS_F8E4M3 ? args.scales : nullptr;
  p.bias = args.bias;
  p.rows = static_cast<int>(args.rows);
  p.outputs = static_cast<int>(args.outputs);
  p.inputs = static_cast<int>(args.inputs);
  p.tiles = (p.outputs + tile_outputs - 1) / tile_outputs;
  p.slices = best_slices(args);
  p.slice_blocks = std::min(args.sm_count / p.slices, p.tiles);
  p.k_units = p.inputs / unit_values_of(args);
  p.is_accumulating = args.is_accumulating;
  p.is_f32_out = args.y_dtype == KVS_F32;
  p.counters = static_cast<int*>(args.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + tiles_max * 4);
  const bool is_fp8 = args.weight_dtype == KVS_F8E4M3;
  if (args.x_dtype == KVS_BF16) {
    return is_fp8 ? launch_rows<__nv_bfloat16, true>(p, args) : launch_rows<__nv_bfloat16, false>(p, args);
  }
  return is_fp8 ? launch_rows<__half, true>(p, args) : launch_rows<__half, false>(p, args);
}

}  // namespace kvs
