// Attention over paged KV blocks: what a launch needs, as raw device pointers and numbers. Keys lie turned by their
// offset in the block, queries are not turned at all; the kernel turns q of position p by R(p - base) against each
// block's base position. See kvs_attention.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kvasir.h"
#include "device-step.h"

namespace kvs {

struct AttentionArgs {
  void* y;        // (row_count, heads * head_dim) compute; rows of padding get zeros
  const void* q;  // (row_count, heads * head_dim) compute, not turned

  /** One layer of gpu block b: [K|V][kv head][token][head_dim] of kv_dtype at kv + b * block_stride_bytes. */
  const char* kv;
  uint64_t block_stride_bytes;
  kvs_dtype kv_dtype;       // F32, F16 or BF16
  kvs_dtype compute_dtype;  // F32, F16 or BF16

  /** [position < max_positions][rotary_dim / 2] F32 in device memory; rotary_dim 0: null. */
  const float* rope_cosine;
  const float* rope_sine;
  const float* alibi_slopes;  // (heads) F32 in device memory, or null
  uint32_t window;            // row of position p sees (p - window, p]; 0: all
  float scale;
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t rotary_dim;
  uint32_t block_tokens;

  DeviceStep step;

  // What the host knows when it launches, to choose a kernel and its grid. Of a captured launch only row_count holds
  // for every replay: sequence_count is then the most there can be, max_context is max_positions, and whatever else
  // varies must be read from `step` on the device.
  uint32_t row_count;
  uint32_t sequence_count;
  uint32_t max_sequence_rows;  // rows of the sequence that has most
  uint32_t max_context;        // positions of the longest view, this step's rows included
  bool is_decode;              // every sequence has one row: row i is sequence i; padding only at the end
  bool is_captured;

  /** Device memory of attention_workspace_bytes(), 256-byte aligned. All zero when the device opens and between
   * launches nobody else writes to it, so counters that a kernel leaves at zero stay there. */
  void* workspace;
  uint64_t workspace_bytes;
  int sm_count;
  int compute_capability;  // 80, 89, 90 ...
  cudaStream_t stream;
};

/** Of the fast kernels, over all steps that the configuration allows. */
uint64_t attention_workspace_bytes(const kvs_device_config& config, int sm_count);

/** Whether the fast kernels serve these types and sizes; simple_attention serves all. */
bool attention_supports(const AttentionArgs& args);

/** Enqueues on args.stream; returns the launch's error. */
cudaError_t attention(const AttentionArgs& args);

/** The oracle: plain F32 arithmetic, any type and size, no workspace. */
cudaError_t simple_attention(const AttentionArgs& args);

}  // namespace kvs
