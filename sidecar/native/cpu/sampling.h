// kvs_sample: from a row of logits to a token and its logprobs.

#pragma once

#include "kernels.h"

namespace kvs {

struct SampleTask {
  const float* logits;  // (logit_count, vocab_size)
  kvs_sample_result* results;
  int32_t* tokens;  // [slot][token_stride]
  uint32_t token_stride;
  const StepInput* step;
  const kvs_device_config* config;
};

/** Logit row `row` of the step, by the order of steps that kvasir.h gives. */
void sample(const Kernels& kernels, const SampleTask& task, uint32_t row, Scratch& scratch);

/** Bytes that one row may take. */
uint64_t sample_scratch_bytes(const kvs_device_config& config);

}  // namespace kvs
