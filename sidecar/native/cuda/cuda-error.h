// How an error of the CUDA runtime becomes a Failure. Out of memory leaves the device as it was; anything else means
// that work was lost or never enqueued, so the device is given up (device.h keeps the reason).

#pragma once

#include <cuda_runtime_api.h>

#include "../common/failure.h"

namespace kvs {

inline void check_cuda(cudaError_t error, const char* what) {
  if (__builtin_expect(error == cudaSuccess, 1)) return;
  cudaGetLastError();  // what is not sticky is told once
  fail(error == cudaErrorMemoryAllocation ? KVS_OUT_OF_MEMORY : KVS_DEVICE_FAILED, "%s: %s", what,
       cudaGetErrorString(error));
}

/** Behind a kernel launch: was it accepted? */
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

}  // namespace kvs
