// A step's way to the device: from the caller's page-locked memory on a stream of its own, so that it travels while
// the step before still computes, then spread to the fixed arrays that kernels and captured graphs read.

#pragma once

#include <array>
#include <cstdint>

#include "../common/step-input.h"
#include "device-memory.h"
#include "device-step.h"
#include "streams.h"

namespace kvs {

class StepUpload {
 public:
  StepUpload(const kvs_device_config& config, int urgent_priority);

  /** `step` (page-locked, checked) becomes the input of what is enqueued on the compute stream from here. */
  void begin(const int32_t* step, uint32_t bytes, const StepInput& input, cudaStream_t compute);

  /** sampling and the biases lie in the upload itself: they hold until the next begin(). */
  const DeviceStep& arrays() const { return arrays_; }

 private:
  /** Uploads in flight: the step in work, the next, and one that travels. */
  static constexpr uint32_t slot_count = 3;

  struct Slot {
    DeviceMemory memory;
    CudaEvent uploaded;
    CudaEvent released;
  };

  void grow(Slot& slot, uint64_t bytes);

  CudaStream stream_;
  const kvs_device_config config_;
  uint64_t table_capacity_ = 0;  // int32s
  std::array<Slot, slot_count> slots_;
  uint64_t begun_ = 0;
  DeviceMemory memory_;
  DeviceStep arrays_{};
};

}  // namespace kvs
