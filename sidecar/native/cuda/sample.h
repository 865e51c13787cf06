// kvs_sample on the GPU: logits never leave it.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kvasir.h"
#include "device-step.h"

namespace kvs {

struct SampleArgs {
  const float* logits;  // (logit_count, vocab_size)
  kvs_sample_result* results;  // page-locked host memory
  int32_t* tokens;             // [slot][token_stride]
  uint32_t token_stride;
  uint32_t vocab_size;
  uint32_t logit_count;
  DeviceStep step;
  bool has_changes;  // some row has penalties or biases
  bool is_greedy;    // no row has a temperature or wants logprobs
  char* workspace;
  uint64_t workspace_bytes;
  int sm_count;
  int compute_capability;
  cudaStream_t stream;
};

/** Zero when the device opens. */
uint64_t sampling_workspace_bytes(const kvs_device_config& config);

void sample(const SampleArgs& args);

/** Whether choosing a token looks at other logits than the model's. */
__host__ __device__ inline bool has_penalties(const kvs_step_sampling& sampling) {
  return sampling.repetition_penalty != 1.0f || sampling.frequency_penalty != 0.0f ||
         sampling.presence_penalty != 0.0f;
}
__host__ __device__ inline bool is_changed(const kvs_step_sampling& sampling) {
  return sampling.sequence >= 0 && sampling.sampled != 0 && (has_penalties(sampling) || sampling.bias_count > 0);
}
/** Whether the likeliest token is all there is to find. */
__host__ __device__ inline bool is_greedy(const kvs_step_sampling& sampling) {
  return sampling.temperature == 0.0f && sampling.top_logprobs < 0;
}

}  // namespace kvs
