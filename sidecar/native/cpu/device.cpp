// Opening and closing a device, memory, weights, tables: the blocking calls of start-up.

#include "device.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>

#include "../common/system-info.h"
#include "sampling.h"

namespace {

// Two steps of a model of 100 layers, with room to spare; a queued operation takes 40 bytes.
constexpr uint32_t compute_queue_capacity = 16384;
constexpr uint32_t copy_queue_capacity = 1024;
constexpr uint32_t compute_spin_us = 30;
constexpr uint32_t threads_max = 512;

uint32_t thread_count_of(const kvs_device_config& config) {
  if (config.thread_count != 0) return config.thread_count;
  const uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::min(std::max(1u, cores - 1), threads_max);  // one core stays with the main thread
}

const kvs_device_config& checked_config(const kvs_device_config& config) {
  using kvs::require;
  require(config.compute_dtype == KVS_F32, "the CPU library computes in F32");
  if (config.kv_dtype > KVS_BF16) kvs::fail(KVS_UNSUPPORTED, "the CPU library keeps KV as F32, F16 or BF16");
  require(config.thread_count <= threads_max, "%u threads: at most %u", config.thread_count, threads_max);
  return config;
}

}  // namespace

uint64_t kvs::AddressMap::allocate(uint64_t bytes) {
  HostMemory memory(bytes);
  const uint64_t address = reinterpret_cast<uint64_t>(memory.data());
  allocations_.emplace(address, std::move(memory));
  return address;
}

bool kvs::AddressMap::contains(uint64_t address, uint64_t bytes) const {
  auto next = allocations_.upper_bound(address);
  if (next == allocations_.begin()) return false;
  --next;
  const uint64_t offset = address - next->first;
  return offset <= next->second.bytes() && bytes <= next->second.bytes() - offset;
}

kvs_device::kvs_device(const kvs_device_config& wanted)
    : config(checked_config(wanted)),
      kernels(kvs::select_kernels(config.isa)),
      tokens(static_cast<uint64_t>(config.max_sequences) * token_stride() * sizeof(int32_t)),
      pool(thread_count_of(config), std::max(kernels.scratch_bytes(config), kvs::sample_scratch_bytes(config))),
      compute("kvs-compute", compute_queue_capacity, compute_spin_us),
      load("kvs-load", copy_queue_capacity, 0),
      save("kvs-save", copy_queue_capacity, 0) {}

kvs_device::~kvs_device() {
  drain();
  for (kvs_weight* weight : weights) delete weight;
}

float* kvs_device::device_memory(uint64_t address, uint64_t bytes, const char* name) const {
  kvs::require(address % 4 == 0 && device_allocations.contains(address, bytes),
               "%s: %llu bytes at %#llx are not device memory", name, static_cast<unsigned long long>(bytes),
               static_cast<unsigned long long>(address));
  return reinterpret_cast<float*>(address);
}

char* kvs_device::host_memory(uint64_t address, uint64_t bytes, const char* name) const {
  kvs::require(address % 4 == 0 && host_allocations.contains(address, bytes),
               "%s: %llu bytes at %#llx are not memory of kvs_alloc_host", name,
               static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(address));
  return reinterpret_cast<char*>(address);
}

kvs_weight& kvs_device::known(kvs_weight* weight) const {
  kvs::require(weights.count(weight) != 0, "not a weight of this device");
  return *weight;
}

kvs::Stream& kvs_device::stream(kvs_stream index) {
  kvs::require(index <= KVS_STREAM_SAVE, "no stream %u", index);
  return index == KVS_STREAM_COMPUTE ? compute : index == KVS_STREAM_LOAD ? load : save;
}

kvs::KvView kvs_device::kv_view(uint32_t layer) const {
  return {kv.data() + layer * kvs::layer_bytes_of(config), kvs::slot_bytes_of(config), config.kv_dtype};
}

void kvs_device::drain() {
  compute.drain();
  load.drain();
  save.drain();
}

kvs_device& kvs::checked(kvs_device* device) {
  require(device != nullptr, "device must not be null");
  return *device;
}

std::shared_ptr<kvs::WakeSignal> kvs::wake_signal_of(kvs_device* device) { return checked(device).wake; }

using kvs::checked;
using kvs::guard;
using kvs::require;

extern "C" {

uint32_t kvs_abi_version(void) { return KVS_ABI_VERSION; }

kvs_status kvs_open(const kvs_device_config* config, kvs_device** out) {
  return guard([&] {
    require(out != nullptr, "out must not be null");
    kvs::check_config(config);
    *out = new kvs_device(*config);
  });
}

kvs_status kvs_close(kvs_device* device) {
  return guard([&] { delete &checked(device); });
}

kvs_status kvs_device_info(kvs_device* device, char* json, uint32_t capacity_bytes) {
  return guard([&] {
    const kvs_device& d = checked(device);
    require(json != nullptr && capacity_bytes > 0, "json must not be null");
    // numeric_mode names everything that decides bits: change the number with the order of any sum.
    std::snprintf(json, capacity_bytes,
                  "{\"backend\":\"cpu\",\"name\":\"%s\",\"isa\":\"%s\",\"threads\":%u,"
                  "\"numeric_mode\":\"cpu-%s-f32-1\",\"memory_bytes\":%llu}",
                  kvs::processor_name().c_str(), d.kernels.isa, d.pool.thread_count(), d.kernels.isa,
                  static_cast<unsigned long long>(kvs::memory_info().total_bytes));
  });
}

kvs_status kvs_memory_info(kvs_device* device, uint64_t* free_bytes, uint64_t* total_bytes) {
  return guard([&] {
    checked(device);
    require(free_bytes != nullptr && total_bytes != nullptr, "out must not be null");
    const kvs::MemoryInfo info = kvs::memory_info();
    *free_bytes = info.free_bytes;
    *total_bytes = info.total_bytes;
  });
}

kvs_status kvs_set_rope(kvs_device* device, const double* inverse_frequencies) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(inverse_frequencies != nullptr, "inverse_frequencies must not be null");
    const uint32_t pairs = d.config.rotary_dim / 2;
    for (uint32_t i = 0; i < pairs; ++i) {
      require(std::isfinite(inverse_frequencies[i]), "frequency %u is not finite", i);
    }
    d.drain();
    const uint64_t bytes = static_cast<uint64_t>(d.config.max_positions) * pairs * sizeof(float);
    d.rope_cosine = kvs::HostMemory(bytes);
    d.rope_sine = kvs::HostMemory(bytes);
    float* cosine = reinterpret_cast<float*>(d.rope_cosine.data());
    float* sine = reinterpret_cast<float*>(d.rope_sine.data());
    for (uint64_t position = 0; position < d.config.max_positions; ++position) {
      for (uint32_t i = 0; i < pairs; ++i) {
        const double angle = static_cast<double>(position) * inverse_frequencies[i];
        cosine[position * pairs + i] = static_cast<float>(std::cos(angle));
        sine[position * pairs + i] = static_cast<float>(std::sin(angle));
      }
    }
    d.has_rope = true;
  });
}

kvs_status kvs_set_alibi(kvs_device* device, const float* slopes) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(slopes != nullptr, "slopes must not be null");
    for (uint32_t i = 0; i < d.config.heads; ++i) require(std::isfinite(slopes[i]), "slope %u is not finite", i);
    d.drain();
    d.alibi_slopes.assign(slopes, slopes + d.config.heads);
  });
}

kvs_status kvs_alloc(kvs_device* device, uint64_t bytes, uint64_t* address) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(bytes > 0 && address != nullptr, "alloc: bytes must be positive, address not null");
    *address = d.device_allocations.allocate(bytes);
  });
}

kvs_status kvs_free(kvs_device* device, uint64_t address) {
  return guard([&] {
    kvs_device& d = checked(device);
    d.drain();
    require(d.device_allocations.release(address), "free: not an allocation of this device");
  });
}

kvs_status kvs_alloc_host(kvs_device* device, uint64_t bytes, uint64_t* address) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(bytes > 0 && address != nullptr, "alloc_host: bytes must be positive, address not null");
    *address = d.host_allocations.allocate(bytes);
  });
}

kvs_status kvs_free_host(kvs_device* device, uint64_t address) {
  return guard([&] {
    kvs_device& d = checked(device);
    d.drain();
    require(d.host_allocations.release(address), "free_host: not an allocation of this device");
  });
}

kvs_status kvs_weight_create(kvs_device* device, uint32_t rows, uint32_t cols, kvs_dtype dtype, kvs_weight** out) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(out != nullptr && rows > 0 && cols > 0, "weight: rows and cols must be positive, out not null");
    require(rows <= (1u << 28) && cols <= (1u << 24), "weight: (%u, %u) is too large", rows, cols);
    if (dtype > KVS_BF16) kvs::fail(KVS_UNSUPPORTED, "weights are F32, F16 or BF16");
    auto weight = std::make_unique<kvs_weight>(d.weight_memory, rows, cols, dtype);
    d.weights.insert(weight.get());
    *out = weight.release();
  });
}

kvs_status kvs_weight_upload(kvs_device* device, kvs_weight* weight, uint32_t row_begin, uint32_t row_count,
                             const void* source, kvs_dtype source_dtype) {
  return guard([&] {
    kvs_device& d = checked(device);
    kvs_weight& w = d.known(weight);
    require(source != nullptr && source_dtype <= KVS_BF16, "weight: source must be F32, F16 or BF16");
    require(row_count > 0 && row_begin <= w.rows && row_count <= w.rows - row_begin, "weight: rows [%u, +%u) of %u",
            row_begin, row_count, w.rows);
    d.compute.drain();
    d.compute.push([&] { w.upload(d.pool, row_begin, row_count, source, source_dtype); });
    d.compute.drain();
  });
}

kvs_status kvs_weight_fill_random(kvs_device* device, kvs_weight* weight, uint64_t seed, float deviation) {
  return guard([&] {
    kvs_device& d = checked(device);
    kvs_weight& w = d.known(weight);
    require(std::isfinite(deviation) && deviation >= 0.0f, "weight: deviation must be finite and not negative");
    d.compute.drain();
    d.compute.push([&] { w.fill_random(d.pool, seed, deviation); });
    d.compute.drain();
  });
}

kvs_status kvs_weight_free(kvs_device* device, kvs_weight* weight) {
  return guard([&] {
    kvs_device& d = checked(device);
    d.known(weight);
    d.compute.drain();
    d.weights.erase(weight);
    delete weight;
  });
}

}  // extern "C"
