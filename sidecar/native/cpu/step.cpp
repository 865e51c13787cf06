// The step input and the copies around it: kvs_write_tokens, kvs_begin_step, kvs_copy_in, kvs_copy_out, graphs.

#include <cstring>
#include <vector>

#include "device.h"

using kvs::checked;
using kvs::guard;
using kvs::require;

extern "C" {

kvs_status kvs_write_tokens(kvs_device* device, uint32_t slot, uint32_t position, const int32_t* ids, uint32_t count) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(slot < d.config.max_sequences, "no token slot %u of %u", slot, d.config.max_sequences);
    require(ids != nullptr && position <= d.token_stride() && count <= d.token_stride() - position,
            "%u tokens at %u do not fit a slot of %u", count, position, d.token_stride());
    for (uint32_t i = 0; i < count; ++i) {
      require(ids[i] >= 0 && static_cast<uint32_t>(ids[i]) < d.config.vocab_size, "token id %d of %u", ids[i],
              d.config.vocab_size);
    }
    const uint64_t at = static_cast<uint64_t>(slot) * d.token_stride() + position;
    int32_t* to = reinterpret_cast<int32_t*>(d.tokens.data()) + at;
    return kvs::enqueue(d.compute, [to, copy = std::vector<int32_t>(ids, ids + count)] {
      std::memcpy(to, copy.data(), copy.size() * sizeof(int32_t));
    });
  });
}

kvs_status kvs_begin_step(kvs_device* device, const int32_t* step, uint32_t bytes) {
  return guard([&] {
    kvs_device& d = checked(device);
    d.host_memory(reinterpret_cast<uint64_t>(step), bytes, "step");
    const kvs::StepInput input = kvs::parse_step(step, bytes, d.config, d.block_count);
    const kvs_status status = kvs::enqueue(d.compute, [&d, input] { d.running_step = input; });
    if (status == KVS_OK) d.begun_step = input;
    return status;
  });
}

kvs_status kvs_copy_out(kvs_device* device, uint64_t destination, uint64_t source, uint64_t bytes) {
  return guard([&] {
    kvs_device& d = checked(device);
    char* to = d.host_memory(destination, bytes, "destination");
    const float* from = d.device_memory(source, bytes, "source");
    return kvs::enqueue(d.compute, [to, from, bytes] { std::memcpy(to, from, bytes); });
  });
}

kvs_status kvs_copy_in(kvs_device* device, uint64_t destination, const void* source, uint64_t bytes) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(source != nullptr, "copy_in: source must not be null");
    float* to = d.device_memory(destination, bytes, "destination");
    const char* from = static_cast<const char*>(source);
    return kvs::enqueue(d.compute, [to, copy = std::vector<char>(from, from + bytes)] {
      std::memcpy(to, copy.data(), copy.size());
    });
  });
}

// An operation costs well under a microsecond to queue here: nothing to gain from capturing.
static kvs_status refuse_graph(kvs_device* device) {
  return guard([&] {
    checked(device);
    kvs::fail(KVS_UNSUPPORTED, "the CPU library captures no graphs");
  });
}

kvs_status kvs_graph_begin(kvs_device* device, uint32_t) { return refuse_graph(device); }
kvs_status kvs_graph_end(kvs_device* device, uint32_t) { return refuse_graph(device); }
kvs_status kvs_graph_launch(kvs_device* device, uint32_t) { return refuse_graph(device); }

}  // extern "C"
