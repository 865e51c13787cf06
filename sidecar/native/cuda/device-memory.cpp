// Allocation and release; errors of a release are of no use to anyone and are dropped.

#include "device-memory.h"

#include <cstring>

namespace kvs {

DeviceMemory::DeviceMemory(uint64_t bytes, const char* purpose) : bytes_(bytes) {
  if (bytes == 0) return;
  const cudaError_t error = cudaMalloc(&data_, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    constexpr double mebibyte = 1 << 20;
    fail(KVS_OUT_OF_MEMORY, "out of GPU memory: %s needs %.1f MiB, %.1f of %.1f MiB are free", purpose,
         static_cast<double>(bytes) / mebibyte, static_cast<double>(free_bytes) / mebibyte,
         static_cast<double>(total_bytes) / mebibyte);
  }
  check_cuda(error, "cudaMalloc");
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr && cudaFree(data_) != cudaSuccess) cudaGetLastError();
}

PinnedMemory::PinnedMemory(uint64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const cudaError_t error = cudaHostAlloc(&data_, bytes, cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(KVS_OUT_OF_MEMORY, "no %llu bytes of page-locked host memory: check ulimit -l and free memory",
         static_cast<unsigned long long>(bytes));
  }
  check_cuda(error, "cudaHostAlloc");
  std::memset(data_, 0, bytes);
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr && cudaFreeHost(data_) != cudaSuccess) cudaGetLastError();
}

}  // namespace kvs
