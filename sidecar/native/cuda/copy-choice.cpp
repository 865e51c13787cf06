// The trial of both ways of copying scattered slices, up and down.

#include "copy-choice.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cuda-error.h"
#include "device-memory.h"
#include "streams.h"

namespace kvs {

namespace {

/** Enough for the start of a copy not to count. */
constexpr uint64_t trial_bytes = 16ull << 20;
constexpr uint64_t slices_min = 4;
constexpr uint64_t slices_max = 256;
constexpr int timed_runs = 5;
/** By so much the kernel must win here, where it is alone: beside a step it waits for multiprocessors and takes them
 * from others (48 GB/s become 38 on an H200, while the engine keeps its 53). */
constexpr float kernel_margin = 1.4f;

class Trial {
 public:
  Trial(uint64_t slice_bytes, cudaStream_t stream)
      : slice_bytes_(slice_bytes),
        count_(static_cast<uint32_t>(std::clamp(trial_bytes / slice_bytes, slices_min, slices_max))),
        host_(count_ * stride()),
        device_(count_ * stride(), "the trial of copies"),
        slots_(count_),
        blocks_(count_),
        stream_(stream) {
    // Against each other's order: no two are neighbours.
    for (uint32_t i = 0; i < count_; ++i) {
      slots_[i] = static_cast<int32_t>(i);
      blocks_[i] = static_cast<int32_t>(count_ - 1 - i);
    }
  }

  CopyMethod fastest(bool is_load) const {
    const float by_kernel = milliseconds(CopyMethod::kernel, is_load);
    const float by_engine = milliseconds(CopyMethod::engine, is_load);
    return by_kernel * kernel_margin < by_engine ? CopyMethod::kernel : CopyMethod::engine;
  }

 private:
  uint64_t stride() const { return 2 * slice_bytes_; }

  /** Least: of a thread that was held up, or a bus that others used, nothing is to be learnt. */
  float milliseconds(CopyMethod method, bool is_load) const {
    const LayerCopy copy{host_.as(),     device_.as(), stride(), slice_bytes_,
                         slots_.data(), blocks_.data(), count_,   is_load};
    const CudaEvent begin(cudaEventDefault);
    const CudaEvent end(cudaEventDefault);
    float least = std::numeric_limits<float>::infinity();
    for (int run = 0; run < timed_runs; ++run) {
      copy_layer(copy, method, stream_);  // meanwhile the timed one is enqueued, as in a load of many layers
      begin.record(stream_);
      copy_layer(copy, method, stream_);
      end.record(stream_);
      end.wait();
      float time = 0;
      check_cuda(cudaEventElapsedTime(&time, begin, end), "cudaEventElapsedTime");
      least = std::min(least, time);
    }
    return least;
  }

  const uint64_t slice_bytes_;
  const uint32_t count_;
  const PinnedMemory host_;
  const DeviceMemory device_;
  std::vector<int32_t> slots_;
  std::vector<int32_t> blocks_;
  const cudaStream_t stream_;
};

}  // namespace

CopyChoice fastest_copies(uint64_t slice_bytes, cudaStream_t stream) {
  try {
    const Trial trial(slice_bytes, stream);
    return {trial.fastest(true), trial.fastest(false)};
  } catch (const Failure& failure) {
    if (failure.status() != KVS_OUT_OF_MEMORY) throw;
    return {};
  }
}

const char* name_of(CopyMethod method) {
  switch (method) {
    case CopyMethod::kernel: return "kernel";
    case CopyMethod::rows: return "rows";
    default: return "engine";
  }
}

}  // namespace kvs
