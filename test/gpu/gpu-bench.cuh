// What the kernel benches share: checked calls, memory, random values, timing by events over captured graphs, and the
// copy bandwidth of the card as the ceiling of what is bound by memory.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../../sidecar/native/kvasir.h"

namespace bench {

inline void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s (line %d): %s\n", what, line, cudaGetErrorString(error));
  std::exit(1);
}
#define BENCH_CHECK(call) ::bench::check((call), #call, __LINE__)

template <typename T>
class Device {
 public:
  explicit Device(uint64_t count) : count_(count) {
    BENCH_CHECK(cudaMalloc(&data_, std::max<uint64_t>(1, count) * sizeof(T)));
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    BENCH_CHECK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* get() const { return data_; }
  uint64_t count() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> copy(count_);
    BENCH_CHECK(cudaMemcpy(copy.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }
  void fill_bytes(int byte) { BENCH_CHECK(cudaMemset(data_, byte, count_ * sizeof(T))); }

 private:
  T* data_ = nullptr;
  uint64_t count_;
};

/** Of F16 or BF16. */
inline double half_value(uint16_t bits, kvs_dtype dtype) {
  if (dtype == KVS_F16) {
    __half half;
    std::memcpy(&half, &bits, 2);
    return __half2float(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

__host__ __device__ inline uint32_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return static_cast<uint32_t>(x >> 32);
}

/** About normal, deviation 1: the sum of four uniforms. */
__host__ __device__ inline float normal(uint64_t seed, uint64_t index) {
  const uint32_t a = mix(seed * 0x9e3779b97f4a7c15ull + 2 * index);
  const uint32_t b = mix(seed * 0x9e3779b97f4a7c15ull + 2 * index + 1);
  const float sum = static_cast<float>((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16)) / 65536.0f;
  return (sum - 2.0f) * 1.7320508f;
}

template <typename T>
__global__ void fill_normal(T* to, uint64_t count, uint64_t seed, float deviation) {
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = static_cast<T>(normal(seed, i) * deviation);
  }
}
template <typename T>
void randomize(T* to, uint64_t count, uint64_t seed, float deviation = 1.0f) {
  fill_normal<<<4096, 256>>>(to, count, seed, deviation);
  BENCH_CHECK(cudaGetLastError());
}

inline float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/** Median time in us of what `enqueue` puts on a stream. */
inline float time_stream_us(const std::function<void(cudaStream_t)>& enqueue, int repeats = 9) {
  cudaEvent_t begin, end;
  BENCH_CHECK(cudaEventCreate(&begin));
  BENCH_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    BENCH_CHECK(cudaEventRecord(begin));
    enqueue(nullptr);
    BENCH_CHECK(cudaEventRecord(end));
    BENCH_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    BENCH_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms * 1000);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return median(times);
}

/** Median time in us of one replay of what `enqueue` puts on the stream, captured as a graph. */
inline float time_graph_us(const std::function<void(cudaStream_t)>& enqueue, int repeats = 15) {
  BENCH_CHECK(cudaDeviceSynchronize());  // the stream does not wait for what filled the memory
  cudaStream_t stream;
  BENCH_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  BENCH_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream);
  cudaGraph_t graph;
  BENCH_CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  BENCH_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  BENCH_CHECK(cudaEventCreate(&begin));
  BENCH_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    BENCH_CHECK(cudaEventRecord(begin, stream));
    BENCH_CHECK(cudaGraphLaunch(executable, stream));
    BENCH_CHECK(cudaEventRecord(end, stream));
    BENCH_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    BENCH_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms * 1000);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return median(times);
}

__global__ void copy_kernel(uint4* to, const uint4* from, uint64_t count) {
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; ++j) __stcs(to + i + j * step, value[j]);
  }
  for (; i < count; i += step) to[i] = from[i];
}
__global__ void read_kernel(float* out, const uint4* from, uint64_t count) {
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  uint32_t sum = 0;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i + 7 * step < count; i += 8 * step) {
    uint4 value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= value[j].x ^ value[j].y ^ value[j].z ^ value[j].w;
  }
  if (sum == 12345) *out = 1;
}

/** TB/s of a large copy on the device, bytes read plus bytes written, as the library and a kernel do it; and of
 * reading. */
struct Bandwidth {
  double copy;
  double kernel_copy;
  double read;
};
inline Bandwidth measure_bandwidth() {
  const uint64_t bytes = 4ull << 30;
  Device<char> from(bytes);
  Device<char> to(bytes);
  Device<float> out(1);
  randomize(reinterpret_cast<float*>(from.get()), bytes / 4, 1);
  const float copy = time_stream_us([&](cudaStream_t stream) {
    BENCH_CHECK(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, stream));
  });
  const uint4* source = reinterpret_cast<const uint4*>(from.get());
  const float kernel = time_stream_us([&](cudaStream_t stream) {
    copy_kernel<<<132 * 16, 512, 0, stream>>>(reinterpret_cast<uint4*>(to.get()), source, bytes / 16);
  });
  const float read = time_stream_us(
      [&](cudaStream_t stream) { read_kernel<<<132 * 8, 512, 0, stream>>>(out.get(), source, bytes / 16); });
  const double tb = static_cast<double>(bytes) / 1e6;
  return {2 * tb / copy, 2 * tb / kernel, tb / read};
}
/** Prints the three, returns the best rate of a copy: the ceiling of what is bound by memory. */
inline double copy_bandwidth() {
  const Bandwidth rate = measure_bandwidth();
  std::printf("copy by the library %.2f TB/s, by a kernel %.2f; read by a kernel %.2f\n", rate.copy, rate.kernel_copy,
              rate.read);
  return std::max(rate.copy, rate.kernel_copy);
}

/** Something small between two kernels, as in a real step; with or without a word that the next may start early. */
__global__ void small_kernel(float* value, bool is_letting_next_start) {
#if __CUDA_ARCH__ >= 900
  if (is_letting_next_start) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  if (threadIdx.x == 0 && blockIdx.x == 0) *value += 1.0f;
}

inline void print_device() {
  cudaDeviceProp properties;
  BENCH_CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("device: %s, %d SMs, L2 %d MB\n", properties.name, properties.multiProcessorCount,
              properties.l2CacheSize >> 20);
}

inline int failures = 0;
inline void expect(bool is_right, const char* what) {
  if (is_right) return;
  ++failures;
  std::printf("  WRONG: %s\n", what);
}

}  // namespace bench
