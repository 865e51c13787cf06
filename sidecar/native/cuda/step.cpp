// The step input and the copies around it: kvs_write_tokens, kvs_begin_step, kvs_copy_in, kvs_copy_out.

#include <algorithm>

#include "device.h"
#include "sample.h"

using kvs::require;
using kvs::with_device;

namespace kvs {

namespace {

StepFacts facts_of(const StepInput& input) {
  StepFacts facts;
  facts.row_count = input.row_count;
  facts.sequence_count = input.sequence_count;
  facts.logit_count = input.logit_count;
  facts.is_decode = true;
  for (uint32_t i = 0; i < input.sequence_count; ++i) {
    const kvs_step_sequence& s = input.sequences[i];
    const uint32_t rows = static_cast<uint32_t>(s.row_count);
    const uint32_t context = static_cast<uint32_t>(input.row_position[s.row_begin]) + rows;
    facts.max_sequence_rows = std::max(facts.max_sequence_rows, rows);
    facts.max_context = std::max(facts.max_context, context);
    if (rows != 1 || s.row_begin != static_cast<int32_t>(i)) facts.is_decode = false;
  }
  for (uint32_t i = 0; i < input.logit_count; ++i) {
    facts.has_changed_logits = facts.has_changed_logits || is_changed(input.sampling[i]);
    facts.is_greedy = facts.is_greedy && (input.sampling[i].sequence < 0 || is_greedy(input.sampling[i]));
  }
  return facts;
}

}  // namespace
}  // namespace kvs

extern "C" {

kvs_status kvs_write_tokens(kvs_device* device, uint32_t slot, uint32_t position, const int32_t* ids,
                            uint32_t count) {
  return with_device(device, [&](kvs_device& d) {
    require(slot < d.config.max_sequences, "no token slot %u of %u", slot, d.config.max_sequences);
    require(ids != nullptr && position <= d.token_stride() && count <= d.token_stride() - position,
            "%u tokens at %u do not fit a slot of %u", count, position, d.token_stride());
    for (uint32_t i = 0; i < count; ++i) {
      require(ids[i] >= 0 && static_cast<uint32_t>(ids[i]) < d.config.vocab_size, "token id %d of %u", ids[i],
              d.config.vocab_size);
    }
    d.require_no_capture("kvs_write_tokens");
    int32_t* to = d.tokens.as<int32_t>() + static_cast<uint64_t>(slot) * d.token_stride() + position;
    d.staging.copy_to_device(to, ids, count * sizeof(int32_t), d.compute_stream());
  });
}

kvs_status kvs_begin_step(kvs_device* device, const int32_t* step, uint32_t bytes) {
  return with_device(device, [&](kvs_device& d) {
    d.host_memory(reinterpret_cast<uint64_t>(step), bytes, "step");
    d.require_no_capture("kvs_begin_step");
    const kvs::StepInput input = kvs::parse_step(step, bytes, d.config, d.block_count);
    d.matmuls.settle();
    d.step.begin(step, bytes, input, d.compute_stream());
    d.facts = kvs::facts_of(input);
  });
}

kvs_status kvs_copy_out(kvs_device* device, uint64_t destination, uint64_t source, uint64_t bytes) {
  return with_device(device, [&](kvs_device& d) {
    char* to = d.host_memory(destination, bytes, "destination");
    const char* from = d.device_memory(source, bytes, "source");
    d.require_no_capture("kvs_copy_out");
    kvs::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, d.compute_stream()), "kvs_copy_out");
  });
}

kvs_status kvs_copy_in(kvs_device* device, uint64_t destination, const void* source, uint64_t bytes) {
  return with_device(device, [&](kvs_device& d) {
    require(source != nullptr, "copy_in: source must not be null");
    char* to = d.device_memory(destination, bytes, "destination");
    d.require_no_capture("kvs_copy_in");
    d.staging.copy_to_device(to, source, bytes, d.compute_stream());
  });
}

}  // extern "C"
