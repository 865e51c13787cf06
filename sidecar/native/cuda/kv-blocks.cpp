// KV blocks in device memory, their copies to and from the host tier, and the host tier itself.

#include "device.h"
#include "layer-copy.h"
#include "numa-preference.h"

using kvs::check_cuda;
using kvs::require;
using kvs::with_device;

namespace kvs {

namespace {

/** Layer copies of a stream that may be under way: more than any step enqueues. */
constexpr uint32_t copies_in_flight_max = 1024;

char* block_at(const kvs_device& device, int32_t block) {
  return device.kv.as() + static_cast<uint64_t>(block) * slot_bytes_of(device.config);
}

void check_blocks(const kvs_device& device, const int32_t* blocks, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    require(blocks[i] >= 0 && static_cast<uint32_t>(blocks[i]) < device.block_count, "no block %d of %u", blocks[i],
            device.block_count);
  }
}

/** False when some slots are not page-locked yet. */
bool check_slots(const kvs_device& device, const int32_t* slots, uint32_t count) {
  require(device.arena != nullptr, "there is no host arena");
  const uint32_t ready = device.registration->ready_slots();
  bool are_ready = true;
  for (uint32_t i = 0; i < count; ++i) {
    require(slots[i] >= 0 && static_cast<uint32_t>(slots[i]) < device.arena->slot_count(), "no host slot %d of %u",
            slots[i], device.arena->slot_count());
    are_ready = are_ready && static_cast<uint32_t>(slots[i]) < ready;
  }
  if (!are_ready) device.registration->throw_if_failed();
  return are_ready;
}

kvs_status busy(const char* why) {
  set_last_error(why);
  return KVS_BUSY;
}

kvs_status copy_slices(kvs_device& d, uint32_t layer, const int32_t* blocks, const int32_t* host_slots,
                       uint32_t count, uint32_t event, kvs_stream stream) {
  require(layer < d.config.layers, "no layer %u", layer);
  require(blocks != nullptr && host_slots != nullptr && count > 0, "layer copy: nothing to copy");
  require(d.events.exists(event), "no event %u", event);
  check_blocks(d, blocks, count);
  if (!check_slots(d, host_slots, count)) return busy("the host arena is still being page-locked");
  if (d.events.watched_count(stream) >= copies_in_flight_max) {
    if (d.events.reap()) d.wake->post();  // what was found here must still wake kvs_wait
    if (d.events.watched_count(stream) >= copies_in_flight_max) return busy("the copy stream's queue is full");
  }
  const uint64_t offset = layer * layer_bytes_of(d.config);
  const LayerCopy copy{d.arena->slot(0) + offset,
                       d.kv.as() + offset,
                       slot_bytes_of(d.config),
                       layer_bytes_of(d.config),
                       host_slots,
                       blocks,
                       count,
                       stream == KVS_STREAM_LOAD};
  copy_layer(copy, method_for(copy, copy.is_load ? d.copies.load : d.copies.save), d.stream(stream));
  d.events.record(event, d.stream(stream), stream, true);
  return KVS_OK;
}

}  // namespace
}  // namespace kvs

extern "C" {

kvs_status kvs_kv_create(kvs_device* device, uint32_t block_count) {
  return with_device(device, [&](kvs_device& d) {
    require(block_count > 0 && block_count <= (1u << 30), "block_count: %u", block_count);
    require(d.graphs.empty() && !d.is_capturing(), "kv_create: captured graphs use the blocks there are");
    d.drain();
    d.block_count = 0;
    d.kv = kvs::DeviceMemory();
    d.kv = kvs::DeviceMemory(block_count * kvs::slot_bytes_of(d.config), "the KV blocks");
    // Tensor cores multiply what lies behind a row's last key by zero: it must not be NaN.
    check_cuda(cudaMemsetAsync(d.kv.as(), 0, d.kv.bytes(), d.compute_stream()), "cudaMemset");
    d.drain_compute();
    d.block_count = block_count;
  });
}

kvs_status kvs_block_bytes(kvs_device* device, uint64_t* block_bytes, uint64_t* slot_bytes) {
  return with_device(device, [&](kvs_device& d) {
    require(block_bytes != nullptr && slot_bytes != nullptr, "out must not be null");
    *block_bytes = kvs::block_bytes_of(d.config);
    *slot_bytes = kvs::slot_bytes_of(d.config);
  });
}

kvs_status kvs_copy_blocks(kvs_device* device, const int32_t* sources, const int32_t* destinations, uint32_t count) {
  return with_device(device, [&](kvs_device& d) {
    require(sources != nullptr && destinations != nullptr && count > 0, "copy_blocks: nothing to copy");
    kvs::check_blocks(d, sources, count);
    kvs::check_blocks(d, destinations, count);
    d.require_no_capture("kvs_copy_blocks");
    for (uint32_t i = 0; i < count; ++i) {
      if (sources[i] == destinations[i]) continue;
      check_cuda(cudaMemcpyAsync(kvs::block_at(d, destinations[i]), kvs::block_at(d, sources[i]),
                                 kvs::block_bytes_of(d.config), cudaMemcpyDeviceToDevice, d.compute_stream()),
                 "kvs_copy_blocks");
    }
  });
}

kvs_status kvs_load_layer(kvs_device* device, uint32_t layer, const int32_t* host_slots, const int32_t* blocks,
                          uint32_t count, uint32_t event) {
  return with_device(device, [&](kvs_device& d) {
    return kvs::copy_slices(d, layer, blocks, host_slots, count, event, KVS_STREAM_LOAD);
  });
}

kvs_status kvs_save_layer(kvs_device* device, uint32_t layer, const int32_t* blocks, const int32_t* host_slots,
                          uint32_t count, uint32_t event) {
  return with_device(device, [&](kvs_device& d) {
    return kvs::copy_slices(d, layer, blocks, host_slots, count, event, KVS_STREAM_SAVE);
  });
}

kvs_status kvs_host_arena_open(kvs_device* device, const char* name, uint32_t slot_count, kvs_host_arena* out) {
  return with_device(device, [&](kvs_device& d) {
    require(out != nullptr && slot_count > 0 && slot_count <= (1u << 30), "arena: slot_count must be positive");
    require(d.arena == nullptr, "the host arena is open already");
    const uint64_t slot_bytes = kvs::slot_bytes_of(d.config);
    d.copies = kvs::fastest_copies(kvs::layer_bytes_of(d.config), d.load);
    {
      const kvs::NumaPreference preference(d.gpu.numa_node);
      d.arena = std::make_unique<kvs::HostArena>(name, slot_count, slot_bytes, d.config);
    }
    d.registration = std::make_unique<kvs::ArenaRegistration>(d.arena->slot(0), slot_bytes, slot_count, d.gpu, d.wake);
    *out = d.arena->describe();
  });
}

kvs_status kvs_host_arena_close(kvs_device* device, uint32_t unlink) {
  return with_device(device, [&](kvs_device& d) {
    require(d.arena != nullptr, "there is no host arena");
    d.drain();
    d.registration.reset();
    if (unlink != 0) d.arena->unlink();
    d.arena.reset();
  });
}

}  // extern "C"
