// y = x W^T for few rows of x, bound by the bytes of W: each warp streams 16 rows of W from memory right into the
// registers of the tensor cores' wide operand, kilobytes ahead, while one more warp brings x, the 8-wide operand, chunk
// by chunk of K through a ring in shared memory. A thread block owns whole tiles of 16 outputs (of a slice of K when
// tiles are few); its warps take one tile each, or share the K of fewer. Sums are added up in a fixed order.

#include "skinny-matmul.h"

#include <algorithm>

#include "launch.cuh"
#include "skinny-matmul.cuh"

namespace kvs {
namespace {

constexpr int tile_outputs = 16;
constexpr int rows_max = 64;
constexpr int slices_max = 8;
constexpr int tiles_max = 16384;            // counters
constexpr int sliced_floats_max = 4 << 20;  // partials
constexpr int x_stages = 4;

template <typename T_, bool is_fp8_, int rows_8_>
struct SkinnyShape {
  using T = T_;
  using Chunk = WeightChunk<T_, is_fp8_>;
  static constexpr bool is_fp8 = is_fp8_;
  static constexpr int rows_8 = rows_8_;
  static constexpr int rows = rows_8 * 8;
  static constexpr int warps = 15;  // that multiply; with the one that brings x they fill the registers
  static constexpr int threads = (warps + 1) * 32;
  static constexpr int loads = 4;                                // of 16 bytes, per lane and output
  static constexpr int unit_values = 4 * loads * Chunk::values;  // of K, that a warp loads at once
  static constexpr int x_padding = is_fp8 ? 16 : 64;             // bytes after a row of x: no bank conflicts
  static constexpr int x_stage_bytes = rows_8 <= 2 ? 16 * 1024 : 32 * 1024;  // aimed at
  static constexpr int slot_floats = tile_outputs * rows;
  static constexpr int slot_bytes = warps * slot_floats * 4;
};

/** Contiguous shares of `total`: part i of `parts` begins at share_begin(i). */
__device__ __forceinline__ int share_begin(int total, int parts, int i) {
  return static_cast<int>(static_cast<int64_t>(total) * i / parts);
}

/** What a thread block works on: in each pass up to one tile a warp, in each tile chunk after chunk of K. */
template <typename Shape>
struct BlockWork {
  int slice;
  int k_begin;  // units, of all K
  int k_units;
  int tile_begin;
  int tiles;
  int passes;
  int sharing;      // warps of a tile
  int chunks;       // of a pass
  int first_chunk;  // blocks begin at different places, so that they do not all want the same part of x

  BlockWork() = default;
  __device__ explicit BlockWork(const SkinnyParams& p) {
    slice = blockIdx.x / p.slice_blocks;
    const int block = blockIdx.x % p.slice_blocks;
    k_begin = share_begin(p.k_units, p.slices, slice);
    k_units = share_begin(p.k_units, p.slices, slice + 1) - k_begin;
    tile_begin = share_begin(p.tiles, p.slice_blocks, block);
    tiles = share_begin(p.tiles, p.slice_blocks, block + 1) - tile_begin;
    passes = (tiles + Shape::warps - 1) / Shape::warps;
    sharing = Shape::warps / ((tiles + passes - 1) / passes);
    chunks = (k_units + p.chunk_units - 1) / p.chunk_units;
    first_chunk = share_begin(chunks, p.slice_blocks, block);
  }
  /** Units of the i-th chunk of a pass: (begin, end), in the slice. */
  __device__ __forceinline__ int2 chunk(const SkinnyParams& p, int i) const {
    const int at = i + first_chunk < chunks ? i + first_chunk : i + first_chunk - chunks;
    return {at * p.chunk_units, min((at + 1) * p.chunk_units, k_units)};
  }
  /** Tile of this warp in a pass, of the block; -1: none. */
  __device__ __forceinline__ int tile(int pass) const {
    const int at = share_begin(tiles, passes, pass) + static_cast<int>(threadIdx.x / 32) / sharing;
    return at < share_begin(tiles, passes, pass + 1) ? at : -1;
  }
};

/** The loading side of a warp: its units of K, tile after tile, ahead of the products. */
template <typename Shape>
struct WeightStream {
  static constexpr int value_bytes = Shape::is_fp8 ? 1 : 2;
  const char* base;  // of the lane: its output of the block's first tile, its bytes of the slice's first unit
  int pass = 0;
  int chunk = -1;
  int unit = 0;
  int end = 0;
  int tile;
  int part;  // of the warps that share a tile

  __device__ WeightStream(const SkinnyParams& p, const BlockWork<Shape>& work) {
    const int lane = threadIdx.x % 32;
    const int output = work.tile_begin * tile_outputs + lane / 4;
    base = static_cast<const char*>(p.weight) + static_cast<uint64_t>(output) * p.inputs * value_bytes +
           static_cast<uint64_t>(work.k_begin) * Shape::unit_values * value_bytes + lane % 4 * 16;
    tile = work.tile(0);
    part = static_cast<int>(threadIdx.x / 32) % work.sharing;
  }

  /** Moves to the next unit; false: there is none. */
  __device__ __forceinline__ bool advance(const SkinnyParams& p, const BlockWork<Shape>& work) {
    unit += work.sharing;
    while (unit >= end) {
      if (pass == work.passes || tile < 0) return false;
      if (++chunk == work.chunks) {
        chunk = -1;
        if (++pass < work.passes) tile = work.tile(pass);
        continue;
      }
      const int2 range = work.chunk(p, chunk);
      unit = first_unit(range.x, work.sharing, part);
      end = range.y;
    }
    return true;
  }
  /** First unit from `begin` on that belongs to `part`. */
  static __device__ __forceinline__ int first_unit(int begin, int sharing, int part) {
    const int ahead = part - begin % sharing;
    return begin + (ahead < 0 ? ahead + sharing : ahead);
  }

  __device__ __forceinline__ void load(const SkinnyParams& p, const BlockWork<Shape>& work, uint4 (&low)[Shape::loads],
                                       uint4 (&high)[Shape::loads]) {
    if (!advance(p, work)) return;
    const int64_t row_bytes = static_cast<int64_t>(p.inputs) * value_bytes;
    const char* from = base + tile * (row_bytes * tile_outputs) + unit * (Shape::loads * 64);
    const char* from_8 = from + row_bytes * 8;
    const int past_end = (work.tile_begin + tile + 1) * tile_outputs - p.outputs;
    if (past_end > 0) {  // outputs past the end: the last one again
      const int output = threadIdx.x % 32 / 4;
      from -= max(0, output + 1 + past_end - tile_outputs) * row_bytes;
      from_8 -= max(0, output + 9 + past_end - tile_outputs) * row_bytes;
    }
#pragma unroll
    for (int j = 0; j < Shape::loads; ++j) {
      low[j] = load_streaming(from + j * 64);
      high[j] = load_streaming(from_8 + j * 64);
    }
  }
};

/** sum += the unit's weights by x; x_at: the lane's values of the unit's first load, in its row of x. */
template <typename Shape>
__device__ __forceinline__ void multiply_unit(const uint4 (&low)[Shape::loads], const uint4 (&high)[Shape::loads],
                                              const char* x_at, int x_pitch, int rows, float (&sum)[Shape::rows_8][4]) {
  constexpr int pairs = Shape::Chunk::values / 2;
  const int group = threadIdx.x % 32 / 4;
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
        uint4 x = {0, 0, 0, 0};
        if (n * 8 + group < rows) {
          x = *reinterpret_cast<const uint4*>(x_at + n * 8 * x_pitch + j * Shape::Chunk::values * 8 + i * 16);
        }
        const uint32_t a[4] = {weight_low[4 * i], weight_high[4 * i], weight_low[4 * i + 1], weight_high[4 * i + 1]};
        mma_16x8x16<typename Shape::T>(sum[n], a, x.x, x.y);
        const uint32_t b[4] = {weight_low[4 * i + 2], weight_high[4 * i + 2], weight_low[4 * i + 3],
                               weight_high[4 * i + 3]};
        mma_16x8x16<typename Shape::T>(sum[n], b, x.z, x.w);
      }
    }
  }
}

/** The ring of chunks of x: rows of x_pitch bytes, a full and an empty barrier for each stage. */
struct ChunkRing {
  char* x;
  uint32_t barriers;
  int x_pitch;
  int stage_bytes;
  int stage = 0;
  uint32_t parity = 0;

  __device__ char* at() const { return x + stage * stage_bytes; }
  __device__ uint32_t full() const { return barriers + stage * 8; }
  __device__ uint32_t empty() const { return barriers + (x_stages + stage) * 8; }
  __device__ void advance() {
    if (++stage == x_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/** One warp: all chunks of x, as the others get through with them. */
template <typename Shape>
__device__ void produce_x(const SkinnyParams& p, const BlockWork<Shape>& work, ChunkRing ring) {
  const int lane = threadIdx.x % 32;
  const char* x = static_cast<const char*>(p.x) + static_cast<uint64_t>(work.k_begin) * Shape::unit_values * 2;
  for (int pass = 0; pass < work.passes; ++pass) {
    for (int i = 0; i < work.chunks; ++i) {
      const int2 range = work.chunk(p, i);
      const int row_loads = (range.y - range.x) * Shape::unit_values / 8;
      mbarrier_wait(ring.empty(), ring.parity ^ 1);
      const char* from = x + static_cast<uint64_t>(range.x) * Shape::unit_values * 2 + lane * 16;
      uint32_t to = shared_address(ring.at()) + lane * 16;
      for (int row = 0; row < p.rows; ++row) {
        for (int l = lane; l < row_loads; l += 32) copy_async_16(to + (l - lane) * 16, from + (l - lane) * 16, true);
        from += static_cast<uint64_t>(p.inputs) * 2;
        to += ring.x_pitch;
      }
      copy_async_arrive(ring.full());
      ring.advance();
    }
  }
  copy_async_wait<0>();
}

/** A finished sum of a tile (16 outputs, row) of the block: to y, or to the partials of the slice. */
template <typename Shape>
__device__ __forceinline__ void emit(const SkinnyParams& p, const BlockWork<Shape>& work, int tile, int output, int row,
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

/** A multiplying warp, over all passes. */
template <typename Shape>
__device__ __forceinline__ void multiply_tiles(const SkinnyParams& p, const BlockWork<Shape>& work, ChunkRing ring,
                                               WeightStream<Shape>& stream, uint4 (&low)[2][Shape::loads],
                                               uint4 (&high)[2][Shape::loads], float* slot) {
  const int lane = threadIdx.x % 32;
  const int x_lane = lane / 4 * ring.x_pitch + lane % 4 * Shape::Chunk::values * 2;
  bool is_second = false;
  for (int pass = 0; pass < work.passes; ++pass) {
    const int tile = work.tile(pass);
    float sum[Shape::rows_8][4] = {};
    for (int i = 0; i < work.chunks; ++i) {
      const int2 range = work.chunk(p, i);
      mbarrier_wait(ring.full(), ring.parity);
      const char* x = ring.at() + x_lane;
      for (int unit = WeightStream<Shape>::first_unit(range.x, work.sharing, stream.part); tile >= 0 && unit < range.y;
           unit += work.sharing) {
        const char* x_at = x + (unit - range.x) * Shape::unit_values * 2;
        if (is_second) {  // registers have no index
          multiply_unit<Shape>(low[1], high[1], x_at, ring.x_pitch, p.rows, sum);
          stream.load(p, work, low[1], high[1]);
        } else {
          multiply_unit<Shape>(low[0], high[0], x_at, ring.x_pitch, p.rows, sum);
          stream.load(p, work, low[0], high[0]);
        }
        is_second = !is_second;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.advance();
    }
    if (tile < 0) continue;
    if (work.sharing == 1) {
      for_each_sum<Shape>(sum, [&](int output, int row, float s) { emit<Shape>(p, work, tile, output, row, s); });
    } else {
      for_each_sum<Shape>(sum, [&](int output, int row, float s) { slot[row * tile_outputs + output] = s; });
    }
  }
}

/** Tiles whose K several warps shared: their parts, in the warps' order. */
template <typename Shape>
__device__ void add_up_shared_tiles(const SkinnyParams& p, const BlockWork<Shape>& work, const float* slots) {
  for (int i = threadIdx.x; i < work.tiles * Shape::slot_floats; i += Shape::threads) {
    const int tile = i / Shape::slot_floats;
    const int at = i % Shape::slot_floats;
    if (at / tile_outputs >= p.rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < work.sharing; ++w) sum += slots[(tile * work.sharing + w) * Shape::slot_floats + at];
    emit<Shape>(p, work, tile, at % tile_outputs, at / tile_outputs, sum);
  }
}

/** The last block to finish a tile adds up the slices, in order. */
template <typename Shape>
__device__ void add_up_slices(const SkinnyParams& p, const BlockWork<Shape>& work, int* is_last) {
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
  __shared__ __align__(8) uint64_t barriers[2 * x_stages];
  __shared__ BlockWork<Shape> work;  // registers are short
  const int warp = threadIdx.x / 32;
  float* slots = reinterpret_cast<float*>(shared);
  int* is_last = reinterpret_cast<int*>(shared + Shape::slot_bytes);
  const int x_pitch = p.chunk_units * Shape::unit_values * 2 + Shape::x_padding;
  const ChunkRing ring{shared + Shape::slot_bytes + p.flag_bytes, shared_address(barriers), x_pitch, p.rows * x_pitch};
  if (threadIdx.x == 0) {
    work = BlockWork<Shape>(p);
    for (int s = 0; s < x_stages; ++s) {
      mbarrier_init(shared_address(barriers + s), 32);
      mbarrier_init(shared_address(barriers + x_stages + s), Shape::warps);
    }
  }
  __syncthreads();
  uint4 low[2][Shape::loads];
  uint4 high[2][Shape::loads];
  WeightStream<Shape> stream(p, work);
  if (warp < Shape::warps) {  // weights do not depend on the kernels before
    stream.load(p, work, low[0], high[0]);
    stream.load(p, work, low[1], high[1]);
  }
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (warp == Shape::warps) {
    produce_x<Shape>(p, work, ring);
  } else {
    multiply_tiles<Shape>(p, work, ring, stream, low, high, slots + warp * Shape::slot_floats);
  }
  if (work.sharing > 1) {
    __syncthreads();
    add_up_shared_tiles<Shape>(p, work, slots);
  }
  if (p.slices > 1) add_up_slices<Shape>(p, work, is_last);
}

// ---- launcher ----------------------------------------------------------------------------------------------

int unit_values_of(const SkinnyMatmulArgs& args) { return args.weight_dtype == KVS_F8E4M3 ? 256 : 128; }

/** Bytes that the busiest SM moves with K in so many slices, the rest of its cost in bytes' worth of time; 0:
 * impossible. */
uint64_t cost_of_slices(const SkinnyMatmulArgs& args, int slices) {
  const uint64_t tiles = (args.outputs + tile_outputs - 1) / tile_outputs;
  const uint64_t k_units = args.inputs / unit_values_of(args);
  if (k_units < static_cast<uint64_t>(slices)) return 0;
  if (slices > 1 && (tiles > tiles_max || slices * tiles * args.rows * tile_outputs > sliced_floats_max)) return 0;
  const uint64_t blocks = std::min<uint64_t>(args.sm_count / slices, tiles);
  const uint64_t slice_values = (k_units + slices - 1) / slices * unit_values_of(args);
  const uint64_t tiles_each = (tiles + blocks - 1) / blocks;
  const uint64_t weight_bytes = tiles_each * tile_outputs * slice_values * (args.weight_dtype == KVS_F8E4M3 ? 1 : 2);
  const uint64_t x_bytes = (tiles_each + 15) / 16 * args.rows * slice_values * 2;
  const uint64_t partial_bytes = slices > 1 ? tiles_each * tile_outputs * args.rows * 8 + 40 * 1024 : 0;
  return weight_bytes + x_bytes / 2 + partial_bytes;
}

int best_slices(const SkinnyMatmulArgs& args) {
  int best = 1;
  uint64_t least = cost_of_slices(args, 1);
  for (int slices = 2; slices <= slices_max; ++slices) {
    const uint64_t cost = cost_of_slices(args, slices);
    if (cost == 0 || cost >= least) continue;
    best = slices;
    least = cost;
  }
  return best;
}

template <typename Shape>
cudaError_t launch_skinny(SkinnyParams& p, const SkinnyMatmulArgs& args) {
  const int unit_bytes = p.rows * Shape::unit_values * 2;
  const int slice_units = (p.k_units + p.slices - 1) / p.slices;
  p.chunk_units = std::max(1, std::min(slice_units, Shape::x_stage_bytes / unit_bytes));
  const int tiles = (p.tiles + p.slice_blocks - 1) / p.slice_blocks;
  p.flag_bytes = p.slices > 1 ? (tiles * 4 + 127) / 128 * 128 : 0;
  const int x_bytes = x_stages * p.rows * (p.chunk_units * Shape::unit_values * 2 + Shape::x_padding);
  const int bytes = Shape::slot_bytes + p.flag_bytes + x_bytes;
  if (bytes > shared_bytes_per_block(args.compute_capability)) return cudaErrorNotSupported;
  return launch(true, skinny_kernel<Shape>, p.slices * p.slice_blocks, Shape::threads, bytes, args.stream, p);
}

template <typename T, bool is_fp8>
cudaError_t launch_rows(SkinnyParams& p, const SkinnyMatmulArgs& args) {
  if (p.rows <= 8) return launch_skinny<SkinnyShape<T, is_fp8, 1>>(p, args);
  if (p.rows <= 16) return launch_skinny<SkinnyShape<T, is_fp8, 2>>(p, args);
  if (p.rows <= 32) return launch_skinny<SkinnyShape<T, is_fp8, 4>>(p, args);
  return launch_skinny<SkinnyShape<T, is_fp8, 8>>(p, args);
}

}  // namespace

uint64_t skinny_matmul_workspace_bytes(int) { return tiles_max * 4 + sliced_floats_max * 4ull; }

bool skinny_matmul_supports(const SkinnyMatmulArgs& args) {
  const bool has_room = args.rows <= 16 || shared_bytes_per_block(args.compute_capability) >= 220 * 1024;
  const bool is_half = args.x_dtype == KVS_BF16 || args.x_dtype == KVS_F16;
  return is_half && has_room && (args.weight_dtype == args.x_dtype || args.weight_dtype == KVS_F8E4M3) &&
         args.rows > 0 && args.rows <= rows_max && args.inputs % unit_values_of(args) == 0 &&
         args.compute_capability >= 80 && (args.y_dtype == args.x_dtype || args.y_dtype == KVS_F32);
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
