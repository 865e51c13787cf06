// The two fast kernels behind attention(): decode reads the blocks as they lie, one row a sequence; prefill gathers
// keys and values first, then multiplies tiles of rows. A step of both kinds runs both; each serves the sequences of
// its kind.

#pragma once

#include "attention.h"

namespace kvs {

constexpr uint32_t decode_sequences_max = 1024;
constexpr uint32_t decode_partials_per_block = 2;

/** Head dims are padded to 64, 128 or 256 in shared memory and registers. */
inline uint32_t padded_head_dim(uint32_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

/** Parts of the workspace, in bytes from its start. Decode leaves zeros in its parts, as it found them. */
struct AttentionLayout {
  uint64_t decode_states;    // (max, sum) per partial and head
  uint64_t decode_partials;  // F32 (partial, head of unit, padded head_dim)
  uint64_t prefill_plan;     // PrefillPlan
  uint64_t prefill_states;
  uint64_t prefill_partials;
  uint64_t keys;  // (kv head, key, padded head_dim), then as many values
  uint64_t key_bytes;
  uint64_t total;
};
AttentionLayout attention_layout(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t sm_count,
                                 uint64_t workspace_bytes);

/** Rows of sequences that have one row in this step. */
cudaError_t decode_attention(const AttentionArgs& args, const AttentionLayout& layout);
/** Rows of sequences that have several rows in this step. */
cudaError_t prefill_attention(const AttentionArgs& args, const AttentionLayout& layout);

}  // namespace kvs
