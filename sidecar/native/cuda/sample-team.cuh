// The thread blocks that share a row of logits: on sm_90 and later a cluster of them, which can look into each
// other's shared memory; else a block alone. Every member runs the same code on its share of the row.

#pragma once

#include <cstdint>

namespace kvs {

struct Team {
  uint32_t rank = 0;
  uint32_t size = 1;

  __device__ static Team of_block() {
    Team team;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(team.rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(team.size));
#endif
    return team;
  }

  /** All threads of all members; what they wrote to shared memory is then seen by all. */
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  /** A member's copy of the shared variable `own`. */
  template <class T>
  __device__ T* in(T* own, uint32_t member) const {
#if __CUDA_ARCH__ >= 900
    uint64_t mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(own)), "r"(member));
    return reinterpret_cast<T*>(mapped);
#else
    return own;
#endif
  }
};

}  // namespace kvs
