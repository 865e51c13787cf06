// Kernel launches: shared memory beyond 48 KB is asked for when a kernel first wants so much; on sm_90 and later a
// launch may begin before the kernels ahead of it end (programmatic dependent launch), if those kernels allow it.

#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

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

/** The most that a kernel was ever launched with stays allowed: a captured graph may launch it so again. */
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  constexpr int always_allowed = 48 * 1024;
  if (bytes <= always_allowed) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

inline cudaLaunchAttribute cluster_attribute(int blocks) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

/** In clusters of so many blocks, neighbours in x (sm_90 and later). */
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, int shared_bytes,
                            cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (cluster > 1) attributes[count++] = cluster_attribute(cluster);
#ifndef KVS_NO_EARLY_LAUNCH  // to measure what it gives
  attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[count++].val.programmaticStreamSerializationAllowed = 1;
#endif
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace kvs
