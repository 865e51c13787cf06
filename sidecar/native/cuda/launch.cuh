// Kernel launches: large shared memory is asked for once per kernel; on sm_90 and later a launch may begin before the
// kernels ahead of it end (programmatic dependent launch), which those kernels allow or not.

#pragma once

#include <cuda_runtime.h>

namespace kvs {

/** Most dynamic shared memory that one thread block can have. */
inline int shared_bytes_per_block(int compute_capability) {
  switch (compute_capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    default:
      return compute_capability >= 90 ? 227 * 1024 : 48 * 1024;
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(bool is_early, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
#ifdef KVS_NO_EARLY_LAUNCH  // to measure what it gives
  is_early = false;
#endif
  config.numAttrs = is_early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace kvs
