// Clusters of thread blocks (sm_90 and later): barriers between their blocks, and copies of one box to all of them.

#pragma once

#include <cuda.h>

#include <cstdint>

namespace kvs {

/** The block's number in its cluster. */
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/** All threads of all blocks of the cluster. */
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/** Arrives at a block's barrier that lies where `barrier` lies in this one. Without a scope: `.release.cluster` becomes
 * a fence of all memory for the whole GPU, which takes a quarter of a product's speed, and what the tensor cores have
 * read needs none. */
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

/** To the same place in each block of the mask; the bytes count at each one's own barrier. */
__device__ __forceinline__ void copy_tile_to_all(uint32_t to, const CUtensorMap& map, int column, int row, int matrix,
                                                 int block, uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(block), "r"(barrier), "h"(mask)
      : "memory");
}

}  // namespace kvs
