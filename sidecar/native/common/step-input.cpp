// Checks of what the engine hands over once: the device's configuration and each step's input.

#include "step-input.h"

#include <cmath>

#include "failure.h"

namespace kvs {

namespace {

constexpr int32_t header_ints = sizeof(kvs_step_header) / 4;

/** The array of `count` elements of `ints` int32s each at offset `at`, which must lie inside the step. */
template <class T>
const T* array_at(const int32_t* step, uint32_t step_ints, int32_t at, uint64_t count, const char* name) {
  const uint64_t ints = count * (sizeof(T) / 4);
  require(count == 0 || (at >= header_ints && static_cast<uint64_t>(at) + ints <= step_ints),
          "step: %s lies outside the step's %u bytes", name, step_ints * 4);
  return reinterpret_cast<const T*>(step + (count == 0 ? 0 : at));
}

void check_sequence(const StepInput& input, uint32_t index, const kvs_device_config& config, uint64_t table_ints,
                    uint32_t block_count) {
  const kvs_step_sequence& sequence = input.sequences[index];
  require(sequence.slot >= 0 && static_cast<uint32_t>(sequence.slot) < config.max_sequences,
          "step: sequence %u has slot %d of %u", index, sequence.slot, config.max_sequences);
  require(sequence.row_begin >= 0 && sequence.row_count > 0 &&
              static_cast<uint64_t>(sequence.row_begin) + static_cast<uint64_t>(sequence.row_count) <= input.row_count,
          "step: sequence %u has rows outside the step", index);
  const int32_t position = input.row_position[sequence.row_begin];
  const uint64_t end = static_cast<uint64_t>(position) + static_cast<uint64_t>(sequence.row_count);
  require(position >= 0 && end <= config.max_positions, "step: sequence %u has positions past %u", index,
          config.max_positions);
  for (int32_t i = 0; i < sequence.row_count; ++i) {
    const int32_t row = sequence.row_begin + i;
    require(input.row_sequence[row] == static_cast<int32_t>(index) && input.row_position[row] == position + i,
            "step: row %d does not continue sequence %u", row, index);
  }
  const uint64_t blocks = (end + config.block_tokens - 1) / config.block_tokens;
  require(sequence.table_begin >= 0 && static_cast<uint64_t>(sequence.table_begin) + blocks <= table_ints,
          "step: the block table of sequence %u is too short", index);
  for (uint64_t j = 0; j < blocks; ++j) {
    const int32_t block = input.block_table[sequence.table_begin + j];
    require(block >= -1 && block < static_cast<int64_t>(block_count), "step: sequence %u names block %d of %u", index,
            block, block_count);
  }
}

void check_sampling(const StepInput& input, uint32_t index, const kvs_device_config& config) {
  const kvs_step_sampling& sampling = input.sampling[index];
  require(sampling.sequence >= -1 && sampling.sequence < static_cast<int32_t>(input.sequence_count),
          "step: logit row %u names sequence %d", index, sampling.sequence);
  if (sampling.sequence < 0) return;
  require(input.row_sequence[input.logit_row[index]] == sampling.sequence,
          "step: logit row %u is not of sequence %d", index, sampling.sequence);
  require(std::isfinite(sampling.temperature) && sampling.temperature >= 0.0f, "step: temperature of logit row %u",
          index);
  require(sampling.top_k >= 0 && sampling.top_p > 0.0f && sampling.top_p <= 1.0f && sampling.min_p >= 0.0f &&
              sampling.min_p <= 1.0f,
          "step: top_k, top_p or min_p of logit row %u", index);
  require(std::isfinite(sampling.frequency_penalty) && std::isfinite(sampling.presence_penalty) &&
              std::isfinite(sampling.repetition_penalty) && sampling.repetition_penalty > 0.0f,
          "step: penalties of logit row %u", index);
  require(sampling.prompt_length >= 0, "step: prompt_length of logit row %u", index);
  require(sampling.top_logprobs >= -1 && sampling.top_logprobs <= 20, "step: top_logprobs of logit row %u", index);
  for (int32_t i = 0; i < sampling.bias_count; ++i) {
    const int32_t id = input.bias_id[sampling.bias_begin + i];
    require(id >= 0 && static_cast<uint32_t>(id) < config.vocab_size, "step: logit bias of token %d", id);
    require(std::isfinite(input.bias_value[sampling.bias_begin + i]), "step: logit bias of token %d is not finite", id);
  }
}

/** How many biases the sampling records reach for; the arrays' own length is not in the header. */
uint64_t bias_end(const StepInput& input) {
  uint64_t end = 0;
  for (uint32_t i = 0; i < input.logit_count; ++i) {
    const kvs_step_sampling& sampling = input.sampling[i];
    if (sampling.sequence < 0) continue;
    require(sampling.bias_begin >= 0 && sampling.bias_count >= 0, "step: biases of logit row %u", i);
    if (sampling.bias_count == 0) continue;
    const uint64_t this_end = static_cast<uint64_t>(sampling.bias_begin) + static_cast<uint64_t>(sampling.bias_count);
    end = this_end > end ? this_end : end;
  }
  return end;
}

}  // namespace

StepInput parse_step(const int32_t* step, uint32_t bytes, const kvs_device_config& config, uint32_t block_count) {
  require(step != nullptr && bytes >= sizeof(kvs_step_header) && bytes % 4 == 0, "step: no header");
  const kvs_step_header& header = *reinterpret_cast<const kvs_step_header*>(step);
  const uint32_t ints = bytes / 4;
  require(header.row_count > 0 && static_cast<uint32_t>(header.row_count) <= config.max_rows, "step: %d rows, 1 to %u",
          header.row_count, config.max_rows);
  require(header.sequence_count >= 0 && static_cast<uint32_t>(header.sequence_count) <= config.max_sequences,
          "step: %d sequences of %u", header.sequence_count, config.max_sequences);
  require(header.logit_count >= 0 && static_cast<uint32_t>(header.logit_count) <= config.max_rows,
          "step: %d logit rows of %u", header.logit_count, config.max_rows);
  StepInput input;
  input.row_count = static_cast<uint32_t>(header.row_count);
  input.sequence_count = static_cast<uint32_t>(header.sequence_count);
  input.logit_count = static_cast<uint32_t>(header.logit_count);
  input.sequences = array_at<kvs_step_sequence>(step, ints, header.sequences_at, input.sequence_count, "sequences");
  input.row_sequence = array_at<int32_t>(step, ints, header.row_sequence_at, input.row_count, "row_sequence");
  input.row_position = array_at<int32_t>(step, ints, header.row_position_at, input.row_count, "row_position");
  input.logit_row = array_at<int32_t>(step, ints, header.logit_row_at, input.logit_count, "logit_row");
  input.sampling = array_at<kvs_step_sampling>(step, ints, header.sampling_at, input.logit_count, "sampling");
  for (uint32_t row = 0; row < input.row_count; ++row) {
    require(input.row_sequence[row] >= -1 && input.row_sequence[row] < header.sequence_count,
            "step: row %u names sequence %d", row, input.row_sequence[row]);
  }
  for (uint32_t i = 0; i < input.logit_count; ++i) {
    require(input.logit_row[i] >= 0 && input.logit_row[i] < header.row_count, "step: logit row %u is row %d", i,
            input.logit_row[i]);
  }
  const uint64_t table_ints = input.sequence_count == 0 ? 0 : ints - static_cast<uint64_t>(header.block_table_at);
  require(input.sequence_count == 0 || (header.block_table_at >= header_ints && table_ints <= ints),
          "step: the block table lies outside the step");
  input.block_table = step + (input.sequence_count == 0 ? 0 : header.block_table_at);
  for (uint32_t i = 0; i < input.sequence_count; ++i) check_sequence(input, i, config, table_ints, block_count);
  const uint64_t biases = bias_end(input);
  input.bias_id = array_at<int32_t>(step, ints, header.bias_id_at, biases, "bias_id");
  input.bias_value = array_at<float>(step, ints, header.bias_value_at, biases, "bias_value");
  for (uint32_t i = 0; i < input.logit_count; ++i) check_sampling(input, i, config);
  return input;
}

void check_config(const kvs_device_config* config) {
  require(config != nullptr, "config must not be null");
  require(config->struct_bytes == sizeof(kvs_device_config), "config has %u bytes, this library wants %u",
          config->struct_bytes, static_cast<unsigned>(sizeof(kvs_device_config)));
  const kvs_device_config& c = *config;
  require(c.layers >= 1 && c.layers <= 4096, "layers: %u", c.layers);
  require(c.hidden_size >= 1 && c.hidden_size <= (1u << 20), "hidden_size: %u", c.hidden_size);
  require(c.heads >= 1 && c.heads <= 4096 && c.kv_heads >= 1 && c.heads % c.kv_heads == 0,
          "heads %u must be a multiple of kv_heads %u", c.heads, c.kv_heads);
  require(c.head_dim >= 1 && c.head_dim <= 512, "head_dim: %u, 1 to 512", c.head_dim);
  require(c.rotary_dim <= c.head_dim && c.rotary_dim % 2 == 0, "rotary_dim %u of head_dim %u", c.rotary_dim,
          c.head_dim);
  require(c.vocab_size >= 1 && c.vocab_size <= (1u << 24), "vocab_size: %u", c.vocab_size);
  require(c.block_tokens >= 8 && c.block_tokens <= 256 && (c.block_tokens & (c.block_tokens - 1)) == 0,
          "block_tokens: %u, a power of two from 8 to 256", c.block_tokens);
  require(c.max_positions >= 1 && c.max_positions <= (1u << 24), "max_positions: %u", c.max_positions);
  require(c.max_rows >= 1 && c.max_rows <= (1u << 20), "max_rows: %u", c.max_rows);
  require(c.max_sequences >= 1 && c.max_sequences <= (1u << 16), "max_sequences: %u", c.max_sequences);
  require(std::isfinite(c.attention_scale) && c.attention_scale > 0.0f, "attention_scale must be positive");
}

}  // namespace kvs
