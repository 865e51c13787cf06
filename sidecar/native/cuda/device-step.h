// A step's input as the kernels see it: arrays at fixed addresses in device memory, filled anew for every step, so
// that captured graphs read the step of the moment. kvs_begin_step checked every index in them.

#pragma once

#include <cstdint>

#include "../kvasir.h"

namespace kvs {

/** The counts of the header, as rows, sequences and logit rows of the step in work. */
struct StepCounts {
  int32_t row_count;
  int32_t sequence_count;
  int32_t logit_count;
  int32_t reserved;
};

/** Device pointers; shapes as in kvs_step_header. */
struct DeviceStep {
  const StepCounts* counts;
  const kvs_step_sequence* sequences;
  const int32_t* row_sequence;  // -1: padding
  const int32_t* row_position;
  const int32_t* row_block;     // gpu block of the row's position; -1: outside a sliding window; -2: padding
  const int32_t* block_table;  // -1: outside a sliding window
  const int32_t* logit_row;
  const kvs_step_sampling* sampling;
  const int32_t* bias_id;
  const float* bias_value;
};

}  // namespace kvs
