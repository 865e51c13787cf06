// Skinny products, the weights of a warp: a ring of units in shared memory, filled ahead of the products. Each lane
// copies the bytes that it will multiply, so nothing but its own copies need be waited for. Loads into registers, the
// shorter way, end at some 29 bytes a nanosecond and multiprocessor, however many are on their way; these copies do
// not.

#pragma once

#include "skinny-params.cuh"
#include "skinny-weight.cuh"

namespace kvs {

template <typename T_, bool is_fp8_, int rows_8_, int loads_>
struct SkinnyShape {
  using T = T_;
  using Chunk = WeightChunk<T_, is_fp8_>;
  static constexpr bool is_fp8 = is_fp8_;
  static constexpr int rows_8 = rows_8_;
  static constexpr int rows = rows_8 * 8;
  static constexpr int value_bytes = is_fp8 ? 1 : 2;
  static constexpr int loads = loads_;                           // of 16 bytes, a lane and an output
  static constexpr int unit_values = 4 * loads * Chunk::values;  // of K
  static constexpr int unit_bytes = loads * 2 * 512;             // of a warp: lower and upper outputs
  static constexpr int x_padding = is_fp8 ? 16 : 64;             // bytes after a row of x: no bank conflicts
  static constexpr int slot_floats = tile_outputs * rows;
};

template <typename Shape>
class WeightRing {
 public:
  /** memory: of the warp, p.stages units. */
  __device__ WeightRing(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place, char* memory)
      : mine_(memory + threadIdx.x % 32 * 16), bytes_(p.stages * Shape::unit_bytes) {
    for (int i = 0; i < p.stages - 1; ++i) send(p, work, place);
  }

  /** This lane's bytes of the next unit. */
  __device__ __forceinline__ void take(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place,
                                       uint4 (&low)[Shape::loads], uint4 (&high)[Shape::loads]) {
    copy_async_wait_for(p.stages - 2);
    const char* from = mine_ + taken_;
#pragma unroll
    for (int j = 0; j < Shape::loads; ++j) {
      low[j] = *reinterpret_cast<const uint4*>(from + j * 1024);
      high[j] = *reinterpret_cast<const uint4*>(from + j * 1024 + 512);
    }
    advance(taken_);
    send(p, work, place);  // to where the unit before this one was
  }

 private:
  __device__ __forceinline__ void advance(int& offset) const {
    offset += Shape::unit_bytes;
    if (offset == bytes_) offset = 0;
  }

  __device__ __forceinline__ void send(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place) {
    if (left_ == 0) open_run(p, work, place);
    if (left_ != 0) {
      const uint32_t to = shared_address(mine_ + sent_);
#pragma unroll
      for (int j = 0; j < Shape::loads; ++j) {
        copy_async_16(to + j * 1024, from_ + j * 64, true);
        if (to_high_ != 0) copy_async_16(to + j * 1024 + 512, from_ + to_high_ + j * 64, true);
      }
      from_ += p.sharing * (Shape::loads * 64);
      --left_;
      advance(sent_);
    }
    copy_async_commit();
  }

  /** The next chunk of K in which this warp has units; none: it is through. */
  __device__ void open_run(const SkinnyParams& p, const BlockWork& work, const WarpPlace& place) {
    while (pass_ < p.passes) {
      const int tile = place.tile_of(p, pass_);
      if (tile >= work.tiles) return;
      if (next_chunk_ == work.chunks) {
        next_chunk_ = 0;
        ++pass_;
        continue;
      }
      const int chunk = work.chunk(next_chunk_++);
      const int units = work.chunk_units(p, chunk) - place.part;
      if (units <= 0) continue;
      left_ = (units + p.sharing - 1) / p.sharing;
      const int lane = threadIdx.x % 32;
      const TileOutputs outputs = work.outputs(p, tile);
      const int64_t row_bytes = static_cast<int64_t>(p.inputs) * Shape::value_bytes;
      // Past the end: the last output again.
      const int low = min(outputs.low + lane / 4, p.outputs - 1);
      const int high = outputs.has_high ? min(outputs.high + lane / 4, p.outputs - 1) : low;
      const int unit = work.k_begin + chunk * p.chunk_units + place.part;
      from_ = static_cast<const char*>(p.weight) + low * row_bytes + unit * (Shape::loads * 64) + lane % 4 * 16;
      to_high_ = (high - low) * static_cast<int>(row_bytes);
      return;
    }
  }

  char* mine_;
  const int bytes_;  // of the ring
  int sent_ = 0;     // offsets in the ring
  int taken_ = 0;
  const char* from_ = nullptr;
  int to_high_ = 0;  // bytes; 0: there is no upper output
  int left_ = 0;     // units of the run
  int pass_ = 0;
  int next_chunk_ = 0;
};

}  // namespace kvs
