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
