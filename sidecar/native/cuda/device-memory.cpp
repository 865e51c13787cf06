// Allocation and release; errors of a release are of no use to anyone and are dropped.

#include "device-memory.h"

#include <cstring>

namespace kvs {

namespace {

void* allocate_device(uint64_t bytes, const char* purpose) {
  void* data = nullptr;
  if (bytes == 0) return data;
  const cudaError_t error = cudaMalloc(&data, bytes);
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
  return data;
}

void* allocate_pinned(uint64_t bytes) {
  void* data = nullptr;
  if (bytes == 0) return data;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(KVS_OUT_OF_MEMORY, "no %llu bytes of page-locked host memory: check ulimit -l and free memory",
         static_cast<unsigned long long>(bytes));
  }
  check_cuda(error, "cudaHostAlloc");
  std::memset(data, 0, bytes);
  return data;
}

}  // namespace

void free_device(void* data) {
  if (cudaFree(data) != cudaSuccess) cudaGetLastError();
}

void free_pinned(void* data) {
  if (cudaFreeHost(data) != cudaSuccess) cudaGetLastError();
}

DeviceMemory::DeviceMemory(uint64_t bytes, const char* purpose) : OwnedMemory(allocate_device(bytes, purpose), bytes) {}

PinnedMemory::PinnedMemory(uint64_t bytes) : OwnedMemory(allocate_pinned(bytes), bytes) {}

}  // namespace kvs
