// Skinny products, the activations: x of a slice of K in shared memory, chunk after chunk, each with a barrier that
// says it is there.

#pragma once

#include "skinny-ring.cuh"

namespace kvs {

template <typename Shape>
struct SharedX {
  char* x;
  uint32_t barriers;  // of the chunks
  int pitch;          // bytes from a row to the next

  __device__ SharedX(const BlockWork& work, char* x, uint64_t* barriers)
      : x(x), barriers(shared_address(barriers)), pitch(work.k_units * Shape::unit_values * 2 + Shape::x_padding) {}

  /** One thread, before all others use them. */
  __device__ void init() const {
#if __CUDA_ARCH__ >= 900
    const int arrivals = 1;
#else
    const int arrivals = skinny_threads;
#endif
    for (int i = 0; i < skinny_chunks_max; ++i) mbarrier_init(barrier(i), arrivals);
    make_barriers_visible();
  }

  __device__ uint32_t barrier(int i) const { return barriers + i * 8; }
  __device__ void wait_chunk(int i) const { mbarrier_wait(barrier(i), 0); }
  __device__ int chunk_offset(const SkinnyParams& p, int chunk) const {
    return chunk * p.chunk_units * Shape::unit_values * 2;
  }
};

/** A lane's part of x as the narrow operand. Of 16-bit weights it holds the values that it holds of them, in the order
 * of memory; E4M3 weights are permuted in memory, and x comes to the lanes as the tensor cores have it. */
template <typename Shape>
class LaneX {
 public:
  __device__ LaneX(const SharedX<Shape>& shared_x, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < Shape::rows_8; ++n) {
      const int row = n * 8 + (Shape::is_fp8 ? lane % 8 : lane / 4);
      const int values = Shape::is_fp8 ? lane / 8 * 8 : lane % 4 * Shape::Chunk::values;
      is_there_[n] = row < rows;
      // Any row will do for those that are not there: nobody wants their sums.
      from_[n] = shared_x.x + (is_there_[n] ? row : rows - 1) * shared_x.pitch + values * 2;
    }
  }

  /** Operands of two steps of 16 values, the i-th two of the j-th load of the unit at this offset. */
  __device__ __forceinline__ uint4 load(int n, int unit_offset, int j, int i) const {
    const char* from = from_[n] + unit_offset + j * Shape::Chunk::values * 8;
    uint4 x = {0, 0, 0, 0};
    if constexpr (Shape::is_fp8) {
      uint32_t fragment[4];
      load_matrices(fragment, shared_address(from + i * 64));
      x = {fragment[0], fragment[1], fragment[2], fragment[3]};
    } else if (is_there_[n]) {
      x = *reinterpret_cast<const uint4*>(from + i * 16);
    }
    return x;
  }

 private:
  const char* from_[Shape::rows_8];
  bool is_there_[Shape::rows_8];
};

/** Sends for x. All threads. */
template <typename Shape>
__device__ void fetch_x(const SkinnyParams& p, const BlockWork& work, const SharedX<Shape>& shared_x) {
  const uint64_t row_bytes = static_cast<uint64_t>(p.inputs) * 2;
  const char* from = static_cast<const char*>(p.x) + static_cast<uint64_t>(work.k_begin) * Shape::unit_values * 2;
  const uint32_t to = shared_address(shared_x.x);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < work.chunks; ++i) {
    const int chunk = work.chunk(i);
    const int begin = shared_x.chunk_offset(p, chunk);
    const int bytes = work.chunk_units(p, chunk) * Shape::unit_values * 2;
#if __CUDA_ARCH__ >= 900
    if (i % skinny_warps != warp) continue;
    if (lane == 0) mbarrier_expect(shared_x.barrier(chunk), bytes * p.rows);
    __syncwarp();
    if (lane < p.rows) {
      copy_bulk(to + lane * shared_x.pitch + begin, from + lane * row_bytes + begin, bytes, shared_x.barrier(chunk));
    }
#else
    for (int row = warp; row < p.rows; row += skinny_warps) {
      for (int b = begin + lane * 16; b < begin + bytes; b += 512)
        copy_async_16(to + row * shared_x.pitch + b, from + row * row_bytes + b, true);
    }
    copy_async_arrive(shared_x.barrier(chunk));
#endif
  }
}

}  // namespace kvs
