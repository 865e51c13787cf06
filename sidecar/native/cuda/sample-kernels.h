// Launchers of the sampler's stages, for the logit rows [first, first + count) of the step.

#pragma once

#include "sample.h"

namespace kvs {

/** What one part of a row says; parts are merged in order. */
struct LogitStats {
  float max;
  uint32_t argmax;  // lowest id
  uint32_t has_nan;
  float sum;  // of e^(logit - max)
};

struct SampleStage {
  SampleArgs args;
  uint32_t first;
  uint32_t count;
  uint32_t parts;      // a row's statistics come from so many blocks
  LogitStats* stats;   // [row of the stage][of the logits | of the changed logits][parts]
  float* changed;      // [row of the stage][vocab_size]; null when no row is changed
  uint32_t* token_counts;  // [row of the stage][vocab_size], zero between stages
};

/** changed = logits with penalties and biases, for the rows that have any. */
void change_logits(const SampleStage& stage);
void measure_logits(const SampleStage& stage);
/** Results and next tokens. */
void choose_tokens(const SampleStage& stage);

}  // namespace kvs
