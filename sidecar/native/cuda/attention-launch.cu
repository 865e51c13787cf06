// attention(): which kernels serve a step, what lies where in the workspace, and in how many passes prefill goes when
// the gathered keys and values of all its sequences do not fit.

#include <algorithm>

#include "attention-prefill.cuh"
#include "launch.cuh"

namespace kvs {
namespace {

constexpr uint64_t gathered_bytes_max = 256ull << 20;
constexpr uint64_t cached_bytes = 24ull << 20;  // of keys and values that stay in the L2 cache

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

/** Query heads of a prefill tile: a group, or of a wide one the largest divisor up to 16. */
uint32_t packed_heads(uint32_t group) {
  uint32_t packed = std::min(group, 16u);
  while (group % packed != 0) --packed;
  return packed;
}

uint32_t decode_heads_of_unit(uint32_t group) { return group <= 8 ? 8 : 16; }
uint32_t prefill_rows(uint32_t padded_dim) { return padded_dim <= 128 ? 128 : 64; }

/** All but the gathered keys and values. */
AttentionLayout fixed_layout(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t sm_count) {
  AttentionLayout layout = {};
  const uint64_t dim = padded_head_dim(head_dim);
  const uint64_t unit_heads = decode_heads_of_unit(heads / kv_heads);
  const uint64_t decode_slots = static_cast<uint64_t>(sm_count) * decode_partials_per_block;
  const uint64_t prefill_slots = static_cast<uint64_t>(sm_count) * prefill_slots_per_sm;
  const uint64_t rows = prefill_rows(static_cast<uint32_t>(dim));
  uint64_t at = 0;
  const auto take = [&](uint64_t bytes) {
    const uint64_t begin = at;
    at = round_up(at + bytes, 256);
    return begin;
  };
  layout.decode_states = take(decode_slots * unit_heads * 8);
  layout.decode_partials = take(decode_slots * unit_heads * dim * 4);
  layout.prefill_plan = take(sizeof(PrefillPlan));
  layout.prefill_states = take(prefill_slots * rows * 8);
  layout.prefill_partials = take(prefill_slots * rows * dim * 4);
  layout.keys = at;
  return layout;
}

/** Bytes of one key and its value of one head, gathered. */
uint64_t gathered_row_bytes(uint32_t head_dim) { return 2ull * padded_head_dim(head_dim) * 2; }

/** Rows that a view of so many positions takes when it begins anywhere in a key block. */
uint64_t gathered_rows(uint64_t positions) { return round_up(positions, key_block); }

PrefillParams prefill_params(const AttentionArgs& args, const AttentionLayout& layout) {
  PrefillParams p = {};
  p.y = args.y;
  p.q = args.q;
  p.kv = args.kv;
  p.block_stride_bytes = args.block_stride_bytes;
  p.head_stride_bytes = args.block_tokens * args.head_dim * 2;
  p.value_bytes = args.kv_heads * p.head_stride_bytes;
  p.cosine = args.rope_cosine;
  p.sine = args.rope_sine;
  p.slopes = args.alibi_slopes;
  p.scale_log2 = args.scale * 1.44269504f;
  p.window = static_cast<int>(args.window);
  p.heads = static_cast<int>(args.heads);
  p.group = static_cast<int>(args.heads / args.kv_heads);
  p.packed_heads = static_cast<int>(packed_heads(args.heads / args.kv_heads));
  p.packed_inverse = (65536 + p.packed_heads - 1) / p.packed_heads;
  p.head_dim = static_cast<int>(args.head_dim);
  p.rotary_half = static_cast<int>(args.rotary_dim / 2);
  p.block_tokens = static_cast<int>(args.block_tokens);
  while ((1u << p.block_tokens_log2) < args.block_tokens) ++p.block_tokens_log2;
  p.row_count = static_cast<int>(args.row_count);
  p.tile_tokens = static_cast<int>(prefill_rows(padded_head_dim(args.head_dim))) / p.packed_heads;
  p.sm_count = args.sm_count;
  p.step = args.step;
  char* workspace = static_cast<char*>(args.workspace);
  p.plan = reinterpret_cast<PrefillPlan*>(workspace + layout.prefill_plan);
  p.states = reinterpret_cast<float2*>(workspace + layout.prefill_states);
  p.partials = reinterpret_cast<float*>(workspace + layout.prefill_partials);
  p.keys = workspace + layout.keys;
  return p;
}

cudaError_t prefill_pass(const PrefillParams& p, const AttentionArgs& args) {
  const int dim = static_cast<int>(padded_head_dim(args.head_dim));
  cudaError_t error = gather_keys_and_values(p, args.compute_dtype, dim, args.stream);
  if (error != cudaSuccess) return error;
  error = has_hopper_prefill(args.compute_capability, dim) ? prefill_tiles_hopper(p, args.compute_dtype, dim, args)
                                                           : prefill_tiles(p, args.compute_dtype, dim, args);
  // As the plan has it: tiles are split when they are few.
  const bool are_tiles_many = args.max_sequence_rows / p.tile_tokens * p.units() >= 2u * args.sm_count;
  if (error != cudaSuccess || are_tiles_many) return error;
  return combine_parts(p, args.compute_dtype, dim, args.stream);
}

/** Most tiles that sequences with `rows` rows in all can make, split or not. */
uint64_t tiles_bound(const PrefillParams& p, uint64_t rows, uint64_t sequences) {
  return rows / p.tile_tokens + sequences + static_cast<uint64_t>(p.sm_count) * prefill_slots_per_sm;
}

}  // namespace

AttentionLayout attention_layout(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t sm_count,
                                 uint64_t workspace_bytes) {
  AttentionLayout layout = fixed_layout(heads, kv_heads, head_dim, sm_count);
  layout.total = workspace_bytes;
  layout.key_bytes = workspace_bytes > layout.keys ? (workspace_bytes - layout.keys) / 2 / 256 * 256 : 0;
  return layout;
}

cudaError_t prefill_attention(const AttentionArgs& args, const AttentionLayout& layout) {
  PrefillParams p = prefill_params(args, layout);
  const bool is_hopper = has_hopper_prefill(args.compute_capability, static_cast<int>(padded_head_dim(args.head_dim)));
  if (!is_hopper || !reads_values_in_place(args)) p.values = static_cast<char*>(p.keys) + layout.key_bytes;
  const uint64_t row_bytes = gathered_row_bytes(args.head_dim) / 2;
  const uint64_t sequence_rows = gathered_rows(args.max_context);
  const uint64_t rows_max = layout.key_bytes / row_bytes / key_block * key_block;        // of all heads of a pass
  const uint64_t several = std::min<uint64_t>(args.sequence_count, args.row_count / 2);  // sequences of several rows
  // As many sequences and heads a pass as fit, whatever their lengths turn out to be.
  uint64_t kv_heads = args.kv_heads;
  if (several * sequence_rows * kv_heads > rows_max) {
    kv_heads = std::max<uint64_t>(1, rows_max / (several * sequence_rows));
  }
  uint64_t sequences = args.sequence_count;
  if (several * sequence_rows * kv_heads > rows_max) sequences = rows_max / sequence_rows;
  if (sequences == 0 || tiles_bound(p, args.row_count, several) > prefill_tiles_max) return cudaErrorNotSupported;
  p.key_capacity = static_cast<int>(rows_max / kv_heads / key_block * key_block);
  const uint64_t cached_rows = cached_bytes / gathered_row_bytes(args.head_dim);
  const uint64_t cached_heads = std::max<uint64_t>(1, cached_rows / std::max<uint64_t>(1, args.max_context));
  p.section_units = static_cast<int>(std::min(cached_heads, kv_heads)) * (p.group / p.packed_heads);
  for (uint64_t s = 0; s < args.sequence_count; s += sequences) {
    p.sequence_begin = static_cast<int>(s);
    p.sequence_end = static_cast<int>(std::min<uint64_t>(args.sequence_count, s + sequences));
    for (uint64_t h = 0; h < args.kv_heads; h += kv_heads) {
      p.kv_head_begin = static_cast<int>(h);
      p.kv_head_end = static_cast<int>(std::min<uint64_t>(args.kv_heads, h + kv_heads));
      const cudaError_t error = prefill_pass(p, args);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

uint64_t attention_workspace_bytes(const kvs_device_config& config, int sm_count) {
  const AttentionLayout layout =
      fixed_layout(config.heads, config.kv_heads, config.head_dim, static_cast<uint32_t>(sm_count));
  const uint64_t sequence = gathered_rows(config.max_positions) * gathered_row_bytes(config.head_dim);
  const uint64_t sequences = std::max(1u, std::min(config.max_sequences, config.max_rows / 2));
  const uint64_t wanted = sequence * config.kv_heads * sequences;
  const uint64_t all_heads = sequence * config.kv_heads;
  return layout.keys + std::min(wanted, std::max(std::min(all_heads, gathered_bytes_max), sequence)) + 1024;
}

bool attention_supports(const AttentionArgs& args) {
  const bool is_half = args.compute_dtype == KVS_BF16 || args.compute_dtype == KVS_F16;
  const uint32_t group = args.heads / args.kv_heads;
  const uint32_t units = args.kv_heads * ((group + 15) / 8);
  const uint64_t tiles = static_cast<uint64_t>(args.max_context) / 8 + 1;
  const bool has_room = args.head_dim <= 128 || shared_bytes_per_block(args.compute_capability) >= 160 * 1024;
  return is_half && has_room && args.kv_dtype == args.compute_dtype && args.compute_capability >= 80 &&
         args.head_dim % 16 == 0 && args.head_dim <= 256 && args.rotary_dim % 16 == 0 && args.scale > 0 &&
         args.block_tokens >= 8 && args.block_stride_bytes % 16 == 0 && args.sequence_count <= decode_sequences_max &&
         args.sequence_count * units * tiles < (1ull << 31);
}

cudaError_t attention(const AttentionArgs& args) {
  if (!attention_supports(args)) return cudaErrorNotSupported;
  const AttentionLayout layout = attention_layout(args.heads, args.kv_heads, args.head_dim,
                                                  static_cast<uint32_t>(args.sm_count), args.workspace_bytes);
  if (args.is_decode || args.max_sequence_rows == 1) return decode_attention(args, layout);
  if (args.sequence_count > 1) {
    const cudaError_t error = decode_attention(args, layout);
    if (error != cudaSuccess) return error;
  }
  return prefill_attention(args, layout);
}

}  // namespace kvs
