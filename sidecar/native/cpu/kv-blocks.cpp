// KV blocks in device memory, their copies to and from the host tier, and the host tier itself.

#include <cstring>
#include <utility>
#include <vector>

#include "device.h"

using kvs::checked;
using kvs::guard;
using kvs::require;

namespace kvs {

void push_record(kvs_device& device, Stream& stream, uint32_t event, bool is_watched);

namespace {

char* block_at(const kvs_device& device, int32_t block) {
  return device.kv.data() + static_cast<uint64_t>(block) * slot_bytes_of(device.config);
}

void check_blocks(const kvs_device& device, const int32_t* blocks, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    require(blocks[i] >= 0 && static_cast<uint32_t>(blocks[i]) < device.block_count, "no block %d of %u", blocks[i],
            device.block_count);
  }
}

void check_slots(const kvs_device& device, const int32_t* slots, uint32_t count) {
  require(device.arena != nullptr, "there is no host arena");
  for (uint32_t i = 0; i < count; ++i) {
    require(slots[i] >= 0 && static_cast<uint32_t>(slots[i]) < device.arena->slot_count(), "no host slot %d of %u",
            slots[i], device.arena->slot_count());
  }
}

struct LayerCopy {
  char* to;
  const char* from;
};

/** Queues the copies and the event behind them; both or neither. */
kvs_status push_layer_copies(kvs_device& device, Stream& stream, std::vector<LayerCopy> copies, uint32_t event) {
  if (!stream.has_room(2)) {
    set_last_error("the copy stream's queue is full");
    return KVS_BUSY;
  }
  const uint64_t bytes = layer_bytes_of(device.config);
  stream.push([copies = std::move(copies), bytes] {
    for (const LayerCopy& copy : copies) std::memcpy(copy.to, copy.from, bytes);
  });
  push_record(device, stream, event, true);
  return KVS_OK;
}

kvs_status copy_layer(kvs_device* device, uint32_t layer, const int32_t* blocks, const int32_t* host_slots,
                      uint32_t count, uint32_t event, bool is_load) {
  kvs_device& d = checked(device);
  require(layer < d.config.layers, "no layer %u", layer);
  require(blocks != nullptr && host_slots != nullptr && count > 0, "layer copy: nothing to copy");
  require(d.events.exists(event), "no event %u", event);
  check_blocks(d, blocks, count);
  check_slots(d, host_slots, count);
  const uint64_t offset = layer * layer_bytes_of(d.config);
  std::vector<LayerCopy> copies(count);
  for (uint32_t i = 0; i < count; ++i) {
    char* block = block_at(d, blocks[i]) + offset;
    char* slot = d.arena->slot(static_cast<uint32_t>(host_slots[i])) + offset;
    copies[i] = is_load ? LayerCopy{block, slot} : LayerCopy{slot, block};
  }
  return push_layer_copies(d, is_load ? d.load : d.save, std::move(copies), event);
}

}  // namespace
}  // namespace kvs

extern "C" {

kvs_status kvs_kv_create(kvs_device* device, uint32_t block_count) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(block_count > 0 && block_count <= (1u << 30), "block_count: %u", block_count);
    d.drain();
    // Kernels load whole vectors of values: the last one may end past the last block.
    const uint64_t vector_bytes = 256;
    d.kv = kvs::HostMemory(block_count * kvs::slot_bytes_of(d.config) + vector_bytes);
    d.block_count = block_count;
  });
}

kvs_status kvs_block_bytes(kvs_device* device, uint64_t* block_bytes, uint64_t* slot_bytes) {
  return guard([&] {
    const kvs_device& d = checked(device);
    require(block_bytes != nullptr && slot_bytes != nullptr, "out must not be null");
    *block_bytes = kvs::block_bytes_of(d.config);
    *slot_bytes = kvs::slot_bytes_of(d.config);
  });
}

kvs_status kvs_copy_blocks(kvs_device* device, const int32_t* sources, const int32_t* destinations, uint32_t count) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(sources != nullptr && destinations != nullptr && count > 0, "copy_blocks: nothing to copy");
    kvs::check_blocks(d, sources, count);
    kvs::check_blocks(d, destinations, count);
    std::vector<std::pair<char*, char*>> copies(count);
    for (uint32_t i = 0; i < count; ++i) {
      copies[i] = {kvs::block_at(d, destinations[i]), kvs::block_at(d, sources[i])};
    }
    const uint64_t bytes = kvs::block_bytes_of(d.config);
    return kvs::enqueue(d.compute, [copies = std::move(copies), bytes] {
      for (const auto& [to, from] : copies) std::memmove(to, from, bytes);
    });
  });
}

kvs_status kvs_load_layer(kvs_device* device, uint32_t layer, const int32_t* host_slots, const int32_t* blocks,
                          uint32_t count, uint32_t event) {
  return guard([&] { return kvs::copy_layer(device, layer, blocks, host_slots, count, event, true); });
}

kvs_status kvs_save_layer(kvs_device* device, uint32_t layer, const int32_t* blocks, const int32_t* host_slots,
                          uint32_t count, uint32_t event) {
  return guard([&] { return kvs::copy_layer(device, layer, blocks, host_slots, count, event, false); });
}

kvs_status kvs_host_arena_open(kvs_device* device, const char* name, uint32_t slot_count, kvs_host_arena* out) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(out != nullptr && slot_count > 0 && slot_count <= (1u << 30), "arena: slot_count must be positive");
    require(d.arena == nullptr, "the host arena is open already");
    d.arena = std::make_unique<kvs::HostArena>(name, slot_count, kvs::slot_bytes_of(d.config), d.config);
    *out = d.arena->describe();
  });
}

kvs_status kvs_host_arena_close(kvs_device* device, uint32_t unlink) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(d.arena != nullptr, "there is no host arena");
    d.drain();
    if (unlink != 0) d.arena->unlink();
    d.arena.reset();
  });
}

}  // extern "C"
