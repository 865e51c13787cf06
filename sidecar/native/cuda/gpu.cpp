// One clear line for each way in which a GPU cannot be used.

#include "gpu.h"

#include <cuda_runtime_api.h>

#include "../common/failure.h"
#include "cuda-error.h"

namespace kvs {

namespace {

constexpr int capability_min = 80;  // cp.async, bf16 matrix units

[[noreturn]] void refuse_driver(cudaError_t error) {
  int version = 0;
  cudaDriverGetVersion(&version);
  cudaGetLastError();
  constexpr const char* advice = "use --backend cpu, or install a driver for CUDA";
  if (version == 0) {
    fail(KVS_UNSUPPORTED, "there is no NVIDIA driver: %s %d.%d", advice, CUDART_VERSION / 1000,
         CUDART_VERSION % 1000 / 10);
  }
  if (error == cudaErrorInsufficientDriver) {
    fail(KVS_UNSUPPORTED, "the NVIDIA driver is too old (it knows CUDA %d.%d): %s %d.%d", version / 1000,
         version % 1000 / 10, advice, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  }
  fail(KVS_UNSUPPORTED, "the NVIDIA driver does not work: %s", cudaGetErrorString(error));
}

}  // namespace

Gpu find_gpu(uint32_t index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    cudaGetLastError();
    fail(KVS_UNSUPPORTED, "there is no NVIDIA GPU here: use --backend cpu");
  }
  if (error != cudaSuccess) refuse_driver(error);
  require(index < static_cast<uint32_t>(count), "no GPU %u: there are %d", index, count);
  Gpu gpu{};
  gpu.index = static_cast<int>(index);
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, gpu.index), "cudaGetDeviceProperties");
  gpu.name = properties.name;
  gpu.sm_count = properties.multiProcessorCount;
  gpu.compute_capability = properties.major * 10 + properties.minor;
  gpu.memory_bytes = properties.totalGlobalMem;
  if (cudaDeviceGetAttribute(&gpu.numa_node, cudaDevAttrHostNumaId, gpu.index) != cudaSuccess) {
    cudaGetLastError();  // a driver that does not know
    gpu.numa_node = -1;
  }
  if (gpu.compute_capability < capability_min) {
    fail(KVS_UNSUPPORTED, "%s has compute capability %d.%d, 8.0 or more is needed: use --backend cpu",
         properties.name, properties.major, properties.minor);
  }
  return gpu;
}

}  // namespace kvs
