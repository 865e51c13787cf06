// kvs_attention: checks, and which kernel serves.

#include "attention.h"

#include "device.h"

namespace {

kvs::AttentionArgs attention_args(kvs_device& d, uint32_t layer, uint32_t window) {
  const kvs_device_config& c = d.config;
  kvs::AttentionArgs args{};
  args.kv = d.kv_layer(layer);
  args.block_stride_bytes = kvs::slot_bytes_of(c);
  args.kv_dtype = c.kv_dtype;
  args.compute_dtype = c.compute_dtype;
  args.rope_cosine = d.rope_cosine.as<const float>();
  args.rope_sine = d.rope_sine.as<const float>();
  args.alibi_slopes = d.alibi_slopes.as<const float>();
  args.window = window;
  args.scale = c.attention_scale;
  args.heads = c.heads;
  args.kv_heads = c.kv_heads;
  args.head_dim = c.head_dim;
  args.rotary_dim = c.rotary_dim;
  args.block_tokens = c.block_tokens;
  args.step = d.step.arrays();
  args.row_count = d.facts.row_count;
  args.max_sequence_rows = d.facts.max_sequence_rows;
  args.is_decode = d.facts.is_decode;
  args.is_captured = d.is_capturing();
  args.sequence_count = args.is_captured ? d.facts.row_count : d.facts.sequence_count;
  args.max_context = args.is_captured ? c.max_positions : d.facts.max_context;
  args.workspace = d.attention_workspace.as();
  args.workspace_bytes = d.attention_workspace.bytes();
  args.sm_count = d.gpu.sm_count;
  args.compute_capability = d.gpu.compute_capability;
  args.stream = d.compute_stream();
  return args;
}

}  // namespace

extern "C" kvs_status kvs_attention(kvs_device* device, uint64_t y, uint64_t q, uint32_t layer, uint32_t window,
                                    uint32_t row_count) {
  return kvs::with_device(device, [&](kvs_device& d) {
    kvs::check_step_rows(d, row_count);
    kvs::check_layer(d, layer);
    const uint64_t bytes = d.compute_bytes(row_count, static_cast<uint64_t>(d.config.heads) * d.config.head_dim);
    kvs::AttentionArgs args = attention_args(d, layer, window);
    args.y = d.device_memory(y, bytes, "y");
    args.q = d.device_memory(q, bytes, "q");
    // Refused before anything of it was enqueued, or after parts that the oracle then overwrites.
    cudaError_t error = kvs::attention_supports(args) ? kvs::attention(args) : cudaErrorNotSupported;
    if (error == cudaErrorNotSupported) error = kvs::simple_attention(args);
    kvs::check_cuda(error, "kvs_attention");
  });
}
