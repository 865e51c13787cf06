// Ways to move one layer of many blocks between host and GPU, by size of slice, neighbours or scattered: what
// layer-copy.cu chooses by.

#include <numeric>
#include <random>

#include "../../sidecar/native/cuda/layer-copy.h"
#include "gpu-bench.cuh"

namespace {

constexpr uint64_t total_bytes = 512ull << 20;
constexpr uint32_t layers = 16;  // slices of one layer lie so many slices apart

struct Buffers {
  char* host = nullptr;
  char* device = nullptr;
};

/** GB/s, the best of a few. */
double speed(const Buffers& buffers, uint64_t slice_bytes, bool is_scattered, bool is_load, kvs::CopyMethod method,
             cudaStream_t stream) {
  const uint32_t slots = static_cast<uint32_t>(total_bytes / layers / slice_bytes);
  std::vector<int32_t> from(slots), to(slots);
  std::iota(from.begin(), from.end(), 0);
  std::iota(to.begin(), to.end(), 0);
  std::mt19937 random(7);
  if (is_scattered) {
    std::shuffle(from.begin(), from.end(), random);
    std::shuffle(to.begin(), to.end(), random);
  }
  double best = 0.0;
  cudaEvent_t begin, end;
  BENCH_CHECK(cudaEventCreate(&begin));
  BENCH_CHECK(cudaEventCreate(&end));
  for (int run = 0; run < 4; ++run) {
    BENCH_CHECK(cudaEventRecord(begin, stream));
    for (uint32_t layer = 0; layer < layers; ++layer) {
      const kvs::LayerCopy copy{buffers.host + layer * slice_bytes,
                                buffers.device + layer * slice_bytes,
                                layers * slice_bytes,
                                slice_bytes,
                                from.data(),
                                to.data(),
                                slots,
                                is_load};
      kvs::copy_layer(copy, method, stream);
    }
    BENCH_CHECK(cudaEventRecord(end, stream));
    BENCH_CHECK(cudaEventSynchronize(end));
    float milliseconds = 0.0f;
    BENCH_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::max(best, static_cast<double>(slots) * layers * slice_bytes / milliseconds / 1e6);
  }
  BENCH_CHECK(cudaEventDestroy(begin));
  BENCH_CHECK(cudaEventDestroy(end));
  return best;
}

}  // namespace

int main() {
  Buffers buffers;
  BENCH_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&buffers.host), total_bytes, cudaHostAllocDefault));
  BENCH_CHECK(cudaMalloc(reinterpret_cast<void**>(&buffers.device), total_bytes));
  for (uint64_t i = 0; i < total_bytes / 4; ++i) reinterpret_cast<uint32_t*>(buffers.host)[i] = bench::mix(i);
  BENCH_CHECK(cudaMemcpy(buffers.device, buffers.host, total_bytes, cudaMemcpyHostToDevice));
  cudaStream_t stream;
  BENCH_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::printf("layer copies, GB/s      %10s %10s %10s %10s %10s\n", "slice", "order", "engine", "rows", "kernel");
  for (const bool is_load : {true, false}) {
    for (uint64_t slice = 4 << 10; slice <= 4 << 20; slice *= 4) {
      for (const bool is_scattered : {false, true}) {
        std::printf("%-23s %6llu KiB %10s", is_load ? "host to GPU" : "GPU to host",
                    static_cast<unsigned long long>(slice >> 10), is_scattered ? "scattered" : "neighbours");
        for (const kvs::CopyMethod method :
             {kvs::CopyMethod::engine, kvs::CopyMethod::rows, kvs::CopyMethod::kernel}) {
          const bool is_hopeless = slice < (16 << 10) && method != kvs::CopyMethod::kernel && is_scattered;
          if (is_hopeless) {
            std::printf(" %10s", "-");
          } else {
            std::printf(" %10.1f", speed(buffers, slice, is_scattered, is_load, method, stream));
          }
        }
        std::printf("\n");
      }
    }
  }
}
