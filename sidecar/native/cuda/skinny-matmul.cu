// y = x W^T for few rows of x, bound by the bytes of W: each warp streams 16 rows of W from memory right into the
// registers of the tensor cores' wide operand, kilobytes ahead, while x, the 8-wide operand, lies in shared memory. A
// thread block owns outputs (of a slice of K when x does not fit); its warps take one tile of 16 outputs each, or share
// the K of fewer. Sums are added up in a fixed order.

#include "skinny-matmul.h"

#include <algorithm>

#include "launch.cuh"
#include "skinny-matmul.cuh"

namespace kvs {
namespace {

constexpr int tile_outputs = 16;
constexpr int slices_max = 8;
constexpr int counters_max = 1024;          // of thread blocks of a slice
constexpr int sliced_floats_max = 4 << 20;  // partials
constexpr int chunks_max = 16;              // of K; x comes chunk by chunk, and is used as soon as it is there
constexpr int warps = 16;
constexpr int threads = warps * 32;

template <typename T_, bool is_fp8_, int rows_8_>
struct SkinnyShape {
  using T = T_;
  using Chunk = WeightChunk<T_, is_fp8_>;
  static constexpr bool is_fp8 = is_fp8_;
  static constexpr int rows_8 = rows_8_;
  static constexpr int rows = rows_8 * 8;
  static constexpr int value_bytes = is_fp8 ? 1 : 2;
  static constexpr int loads = 4;                                // of 16 bytes, per lane and output
  static constexpr int unit_values = 4 * loads * Chunk::values;  // of K, that a warp loads at once
  static constexpr int x_padding = is_fp8 ? 16 : 64;             // bytes after a row of x: no bank conflicts
  static constexpr int slot_floats = tile_outputs * rows;
};

/** What a thread block works on: in each pass up to one tile a warp, in each tile chunk after chunk of K. */
struct BlockWork {
  int slice;
  int k_begin;  // units, of all K
  int k_units;
  int eight_begin;  // of outputs
  int eights;
  int tiles;
  int chunks;       // of a pass
  int first_chunk;  // blocks begin at different places, so that they do not all want the same part of memory

  BlockWork() = default;
  __device__ explicit BlockWork(const SkinnyParams& p) {
    const int block = blockIdx.x;
    slice = blockIdx.y;
    k_begin = p.k_units * slice / p.slices;
    k_units = p.k_units * (slice + 1) / p.slices - k_begin;
    eight_begin = block * p.eights_each + min(block, p.eights_extra);
    eights = p.eights_each + (block < p.eights_extra ? 1 : 0);
    tiles = (eights + 1) / 2;
    chunks = (k_units + p.chunk_units - 1) / p.chunk_units;
    first_chunk = static_cast<int>(static_cast<uint32_t>(block * chunks) / gridDim.x);
  }
  /** The i-th chunk of a pass. */
  __device__ __forceinline__ int chunk(int i) const {
    const int at = i + first_chunk;
    return at < chunks ? at : at - chunks;
  }
};

/** A warp's place among those of its block. */
struct WarpPlace {
  int tile;  // of a pass
  int part;  // of the warps that share a tile: it takes every sharing-th unit of a chunk

  __device__ explicit WarpPlace(const SkinnyParams& p) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    tile = warp / p.sharing;
    part = warp - tile * p.sharing;
    if (tile >= p.pass_tiles) tile = 1 << 20;
  }
  /** Tile of the block in this pass; not below work.tiles: none. */
  __device__ __forceinline__ int tile_of(const SkinnyParams& p, int pass) const { return pass * p.pass_tiles + tile; }
};

/** The loading side of a warp: its units of K, tile after tile, ahead of the products. */
template <typename Shape>
struct WeightStream {
  const char* base;  // of the lane: its output of the block's first tile, its bytes of the slice's first unit
  int pass = 0;
  int chunk = 0;
  int unit;  // of the chunk

  __device__ WeightStream(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place) {
    const int lane = threadIdx.x % 32;
    const int output = work.eight_begin * 8 + lane / 4;
    base = static_cast<const char*>(p.weight) + static_cast<uint64_t>(output) * p.inputs * Shape::value_bytes +
           static_cast<uint64_t>(work.k_begin) * Shape::unit_values * Shape::value_bytes + lane % 4 * 16;
    unit = place.part;
  }

  __device__ __forceinline__ void load(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place,
                                       uint4 (&low)[Shape::loads], uint4 (&high)[Shape::loads]) {
    while (unit >= p.chunk_units || work.chunk(chunk) * p.chunk_units + unit >= work.k_units) {
      if (pass == p.passes) return;  // the chunk is through
      unit = place.part;
      if (++chunk == work.chunks) {
        chunk = 0;
        if (++pass == p.passes) return;
      }
    }
    const int tile = place.tile_of(p, pass);
    if (tile >= work.tiles) return;
    const int64_t row_bytes = static_cast<int64_t>(p.inputs) * Shape::value_bytes;
    const char* from =
        base + tile * (row_bytes * tile_outputs) + (work.chunk(chunk) * p.chunk_units + unit) * (Shape::loads * 64);
    // Outputs past the end: the last one again.
    const int past_end = (work.eight_begin + 2 * tile) * 8 + static_cast<int>(threadIdx.x % 32 / 4) - (p.outputs - 1);
    const char* from_8 = from + (past_end + 8 > 0 ? -min(past_end, 0) : 8) * row_bytes;
    if (past_end > 0) from -= past_end * row_bytes;
    if (past_end > 0) from_8 = from;
    const bool has_upper = 2 * tile + 1 < work.eights;
#pragma unroll
    for (int j = 0; j < Shape::loads; ++j) {
      low[j] = load_streaming(from + j * 64);
      if (has_upper) high[j] = load_streaming(from_8 + j * 64);
    }
    unit += p.sharing;
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

/** x of the slice in shared memory, chunk after chunk, each with a barrier that says it is there. */
template <typename Shape>
struct SharedX {
  char* x;
  uint32_t barriers;
  int x_pitch;

  __device__ char* at(const SkinnyParams& p, int chunk) const { return x + chunk * p.rows * x_pitch; }
  __device__ uint32_t barrier(int chunk) const { return barriers + chunk * 8; }

  __device__ void init(const BlockWork& work) const {
#if __CUDA_ARCH__ >= 900
    const int arrivals = 1;
#else
    const int arrivals = threads;
#endif
    for (int c = 0; c < work.chunks; ++c) mbarrier_init(barrier(c), arrivals);
    make_barriers_visible();
  }

  /** All threads: sends for everything. */
  __device__ void fetch(const SkinnyParams& p, const BlockWork& work) const {
    for (int i = 0; i < work.chunks; ++i) fetch_chunk(p, work, work.chunk(i));
  }

 private:
  __device__ void fetch_chunk(const SkinnyParams& p, const BlockWork& work, int chunk) const {
    const int begin = chunk * p.chunk_units;
    const int bytes = (min(begin + p.chunk_units, work.k_units) - begin) * Shape::unit_values * 2;
    const uint64_t row_bytes = static_cast<uint64_t>(p.inputs) * 2;
    const char* from =
        static_cast<const char*>(p.x) + static_cast<uint64_t>(work.k_begin + begin) * Shape::unit_values * 2;
    const uint32_t to = shared_address(at(p, chunk));
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
#if __CUDA_ARCH__ >= 900
    if (chunk % warps != warp) return;
    if (lane == 0) mbarrier_expect(barrier(chunk), bytes * p.rows);
    __syncwarp();
    if (lane < p.rows) copy_bulk(to + lane * x_pitch, from + lane * row_bytes, bytes, barrier(chunk));
#else
    for (int row = warp; row < p.rows; row += warps) {
      for (int b = lane * 16; b < bytes; b += 512)
        copy_async_16(to + row * x_pitch + b, from + row * row_bytes + b, true);
    }
    copy_async_arrive(barrier(chunk));
#endif
  }
};

/** A finished sum of the block's tile: to y, or to the partials of the slice. output: of the tile's 16. */
template <typename Shape>
__device__ __forceinline__ void emit(const SkinnyParams& p, const BlockWork& work, int tile, int output, int row,
                                     float value) {
  const int eight = 2 * tile + output / 8;
  if (eight >= work.eights || row >= p.rows) return;
  if (p.slices == 1) {
    store_result<typename Shape::T>(p, row, (work.eight_begin + eight) * 8 + output % 8, value);
  } else {
    const int64_t at = static_cast<int64_t>(work.slice) * p.eights + work.eight_begin + eight;
    p.partials[(at * p.rows + row) * 8 + output % 8] = value;
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

/** A warp, over all passes. */
template <typename Shape>
__device__ __forceinline__ void multiply_tiles(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place,
                                               const SharedX<Shape>& shared_x, WeightStream<Shape>& stream,
                                               uint4 (&low)[2][Shape::loads], uint4 (&high)[2][Shape::loads],
                                               float* slot) {
  const int lane = threadIdx.x % 32;
  const int x_pitch = shared_x.x_pitch;
  const int x_lane = lane / 4 * x_pitch + (place.part * Shape::unit_values + lane % 4 * Shape::Chunk::values) * 2;
  bool is_second = false;
  for (int pass = 0; pass < p.passes; ++pass) {
    const int tile = place.tile_of(p, pass);
    if (tile >= work.tiles) return;
    float sum[Shape::rows_8][4] = {};
    for (int i = 0; i < work.chunks; ++i) {
      const int chunk = work.chunk(i);
      const int units = min(p.chunk_units, work.k_units - chunk * p.chunk_units);
      const char* x = shared_x.at(p, chunk) + x_lane;
      mbarrier_wait(shared_x.barrier(chunk), 0);
      for (int unit = place.part; unit < units; unit += p.sharing) {
        if (is_second) {  // registers have no index
          multiply_unit<Shape>(low[1], high[1], x, x_pitch, p.rows, sum);
          stream.load(p, work, place, low[1], high[1]);
        } else {
          multiply_unit<Shape>(low[0], high[0], x, x_pitch, p.rows, sum);
          stream.load(p, work, place, low[0], high[0]);
        }
        is_second = !is_second;
        x += p.sharing * Shape::unit_values * 2;
      }
    }
    if (p.sharing == 1) {
      for_each_sum<Shape>(sum, [&](int output, int row, float s) { emit<Shape>(p, work, tile, output, row, s); });
    } else {
      for_each_sum<Shape>(sum, [&](int output, int row, float s) { slot[row * tile_outputs + output] = s; });
    }
  }
}

/** Tiles whose K several warps shared: their parts, in the warps' order. */
template <typename Shape>
__device__ void add_up_shared_tiles(const SkinnyParams& p, const BlockWork& work, const float* slots) {
  for (int i = threadIdx.x; i < work.tiles * Shape::slot_floats; i += threads) {
    const int tile = i / Shape::slot_floats;
    const int at = i % Shape::slot_floats;
    if (at / tile_outputs >= p.rows) continue;
    float sum = 0.0f;
    for (int w = 0; w < p.sharing; ++w) sum += slots[(tile * p.sharing + w) * Shape::slot_floats + at];
    emit<Shape>(p, work, tile, at % tile_outputs, at / tile_outputs, sum);
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
  for (int i = threadIdx.x; i < work.eights * eight_floats; i += threads) {
    const float* from = p.partials + static_cast<int64_t>(work.eight_begin) * eight_floats + i;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < p.slices; ++s) sum += __ldcg(from + s * slice_floats);
    const int eight = i / eight_floats;
    const int at = i - eight * eight_floats;
    store_result<typename Shape::T>(p, at / 8, (work.eight_begin + eight) * 8 + at % 8, sum);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(threads, 1) skinny_kernel(const __grid_constant__ SkinnyParams p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) uint64_t barriers[chunks_max];
  __shared__ BlockWork shared_work;  // registers are short
  const BlockWork own_work(p);
  const WarpPlace place(p);
  uint4 low[2][Shape::loads];
  uint4 high[2][Shape::loads];
  WeightStream<Shape> stream(p, own_work, place);
  stream.load(p, own_work, place, low[0], high[0]);  // weights do not depend on the kernels before
  stream.load(p, own_work, place, low[1], high[1]);
  float* slots = reinterpret_cast<float*>(shared);
  const SharedX<Shape> shared_x{shared + p.slot_bytes, shared_address(barriers),
                                p.chunk_units * Shape::unit_values * 2 + Shape::x_padding};
  if (threadIdx.x == 0) {
    shared_work = own_work;
    shared_x.init(own_work);
  }
  __syncthreads();
  const BlockWork& work = shared_work;
  wait_for_previous_kernels();
  let_next_kernel_start();
  shared_x.fetch(p, work);
  multiply_tiles<Shape>(p, work, place, shared_x, stream, low, high, slots + threadIdx.x / 32 * Shape::slot_floats);
  if (p.sharing > 1) {
    __syncthreads();
    add_up_shared_tiles<Shape>(p, work, slots);
  }
  if (p.slices > 1) add_up_slices<Shape>(p, work);
}

// ---- launcher ----------------------------------------------------------------------------------------------

int unit_values_of(const SkinnyMatmulArgs& args) { return args.weight_dtype == KVS_F8E4M3 ? 256 : 128; }
int x_padding(const SkinnyMatmulArgs& args) { return args.weight_dtype == KVS_F8E4M3 ? 16 : 64; }
int padded_rows(const SkinnyMatmulArgs& args) { return args.rows <= 8 ? 8 : 16; }

/** How K is sliced, outputs are spread, and shared memory is used. */
void plan_slices(SkinnyParams& p, const SkinnyMatmulArgs& args, int slices) {
  p.slices = slices;
  p.slice_blocks = std::min(args.sm_count / slices, p.eights);
  p.eights_each = p.eights / p.slice_blocks;
  p.eights_extra = p.eights % p.slice_blocks;
  const int tiles = (p.eights_each + (p.eights_extra > 0 ? 1 : 0) + 1) / 2;
  p.passes = (tiles + warps - 1) / warps;
  p.pass_tiles = (tiles + p.passes - 1) / p.passes;
  p.sharing = warps / p.pass_tiles;
  const int slice_units = (p.k_units + slices - 1) / slices;
  p.chunk_units =
      std::min(slice_units, p.sharing * ((slice_units + chunks_max * p.sharing - 1) / (chunks_max * p.sharing)));
  const int chunks = (slice_units + p.chunk_units - 1) / p.chunk_units;
  p.slot_bytes = p.sharing > 1 ? warps * tile_outputs * padded_rows(args) * 4 : 0;
  p.x_bytes = chunks * p.rows * (p.chunk_units * unit_values_of(args) * 2 + x_padding(args));
}

/** Bytes that the busiest SM moves, the rest of its cost in bytes' worth of time; 0: it cannot be done like this. */
uint64_t cost(const SkinnyParams& p, const SkinnyMatmulArgs& args) {
  const int room = shared_bytes_per_block(args.compute_capability) - 1024;
  if (p.k_units < p.slices || p.slot_bytes + p.x_bytes > room) return 0;
  const uint64_t outputs = 8 * (p.eights_each + (p.eights_extra > 0 ? 1 : 0));
  const uint64_t values = (p.k_units + p.slices - 1) / p.slices * unit_values_of(args);
  const uint64_t weight = outputs * values * (args.weight_dtype == KVS_F8E4M3 ? 1 : 2);
  const uint64_t x = args.rows * values * 2;
  if (p.slices == 1) return weight + x / 3;
  if (p.slice_blocks > counters_max) return 0;
  if (static_cast<uint64_t>(p.slices) * p.eights * 8 * args.rows > sliced_floats_max) return 0;
  return weight + x / 3 + outputs * args.rows * 8 + (4 + p.slices) * 10240;
}

/** False: these kernels cannot do it. */
bool plan(SkinnyParams& p, const SkinnyMatmulArgs& args) {
  p = {};
  p.rows = static_cast<int>(args.rows);
  p.outputs = static_cast<int>(args.outputs);
  p.inputs = static_cast<int>(args.inputs);
  p.eights = (p.outputs + 7) / 8;
  p.k_units = p.inputs / unit_values_of(args);
  uint64_t least = 0;
  int best = 0;
  for (int slices = 1; slices <= slices_max; ++slices) {
    plan_slices(p, args, slices);
    const uint64_t now = cost(p, args);
    if (now == 0 || (best != 0 && now >= least)) continue;
    best = slices;
    least = now;
  }
  if (best == 0) return false;
  plan_slices(p, args, best);
  return true;
}

template <typename Shape>
cudaError_t launch_skinny(const SkinnyParams& p, const SkinnyMatmulArgs& args) {
  return launch(true, skinny_kernel<Shape>, dim3(p.slice_blocks, p.slices), threads, p.slot_bytes + p.x_bytes,
                args.stream, p);
}

template <typename T, bool is_fp8>
cudaError_t launch_rows(const SkinnyParams& p, const SkinnyMatmulArgs& args) {
  if (p.rows <= 8) return launch_skinny<SkinnyShape<T, is_fp8, 1>>(p, args);
  return launch_skinny<SkinnyShape<T, is_fp8, 2>>(p, args);
}

}  // namespace

uint64_t skinny_matmul_workspace_bytes(int) { return counters_max * 4 + sliced_floats_max * 4ull; }

bool skinny_matmul_supports(const SkinnyMatmulArgs& args) {
  const bool is_half = args.x_dtype == KVS_BF16 || args.x_dtype == KVS_F16;
  const bool is_fp8 = args.weight_dtype == KVS_F8E4M3;
  SkinnyParams p;
  if (!is_half || (!is_fp8 && args.weight_dtype != args.x_dtype) || args.rows == 0 || args.rows > skinny_rows_max ||
      args.inputs % unit_values_of(args) != 0 || args.compute_capability < 80 ||
      (args.y_dtype != args.x_dtype && args.y_dtype != KVS_F32) || !plan(p, args)) {
    return false;
  }
  return is_fp8 || args.rows <= 8 || p.slices == 1;  // else the library is faster
}

cudaError_t skinny_matmul(const SkinnyMatmulArgs& args) {
  SkinnyParams p;
  if (!skinny_matmul_supports(args) || !plan(p, args)) return cudaErrorNotSupported;
  p.y = args.y;
  p.x = args.x;
  p.weight = args.weight;
  p.scales = args.weight_dtype == KVS_F8E4M3 ? args.scales : nullptr;
  p.bias = args.bias;
  p.is_accumulating = args.is_accumulating;
  p.is_f32_out = args.y_dtype == KVS_F32;
  p.counters = static_cast<int*>(args.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + counters_max * 4);
  const bool is_fp8 = args.weight_dtype == KVS_F8E4M3;
  if (args.x_dtype == KVS_BF16) {
    return is_fp8 ? launch_rows<__nv_bfloat16, true>(p, args) : launch_rows<__nv_bfloat16, false>(p, args);
  }
  return is_fp8 ? launch_rows<__half, true>(p, args) : launch_rows<__half, false>(p, args);
}

}  // namespace kvs
