// The table of this file's instruction set.

uint64_t scratch_bytes(const kvs_device_config& config) {
  const uint64_t attention_bytes = attention_scratch_bytes(config);
  return attention_bytes > matmul_scratch_bytes ? attention_bytes : matmul_scratch_bytes;
}

constexpr Kernels table_of(const char* isa) {
  return {isa,    embed,     rms_norm,        layer_norm, matmul_items, matmul,      append_kv, attention_items,
          attention, silu_mul, gelu, logit_stats, exp_sum, scratch_bytes};
}
