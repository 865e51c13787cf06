// Opening and closing a device, memory, weights, tables: the blocking calls of start-up.

#include "device.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "attention.h"
#include "convert.h"
#include "rope-table.h"
#include "sample.h"

namespace {

constexpr uint64_t staging_bytes = 32ull << 20;

const kvs_device_config& checked_config(const kvs_device_config& config) {
  if (config.compute_dtype > KVS_BF16) kvs::fail(KVS_UNSUPPORTED, "the CUDA library computes in F32, F16 or BF16");
  if (config.kv_dtype > KVS_BF16) kvs::fail(KVS_UNSUPPORTED, "the CUDA library keeps KV as F32, F16 or BF16");
  return config;
}

/** Copies and step uploads go before compute: they are short, or need few multiprocessors. */
int urgent_priority() {
  int least = 0;
  int greatest = 0;
  kvs::check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  return greatest;
}

kvs::DeviceMemory zeroed(uint64_t bytes, const char* purpose) {
  kvs::DeviceMemory memory(bytes, purpose);
  if (bytes != 0) kvs::check_cuda(cudaMemset(memory.as(), 0, bytes), "cudaMemset");
  return memory;
}

}  // namespace

kvs_device::kvs_device(const kvs_device_config& wanted, kvs::Gpu found)
    : config(checked_config(wanted)),
      gpu(std::move(found)),
      load(urgent_priority()),
      save(urgent_priority()),
      staging(staging_bytes),
      step(config, urgent_priority()),
      tokens(zeroed(static_cast<uint64_t>(config.max_sequences) * token_stride() * sizeof(int32_t), "token ids")),
      attention_workspace(zeroed(kvs::attention_workspace_bytes(config, gpu.sm_count), "the workspace of attention")),
      sampling_workspace(zeroed(kvs::sampling_workspace_bytes(config), "the workspace of sampling")),
      matmuls(config, gpu),
      compute_(0),
      product_(gpu, matmuls) {
  kvs::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

kvs_device::~kvs_device() {
  // A lost device refuses everything; what can be freed is.
  cudaDeviceSynchronize();
  cudaGetLastError();
  registration.reset();
  for (auto& [key, graph] : graphs) cudaGraphExecDestroy(graph.executable);
  for (kvs_weight* weight : weights) delete weight;
}

uint64_t kvs_device::checked_device_memory(uint64_t address, uint64_t bytes, const char* name) const {
  kvs::require(address % 4 == 0 && device_allocations.contains(address, bytes),
               "%s: %llu bytes at %#llx are not device memory", name, static_cast<unsigned long long>(bytes),
               static_cast<unsigned long long>(address));
  return address;
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

cudaStream_t kvs_device::stream(kvs_stream index) {
  kvs::require(index <= KVS_STREAM_SAVE, "no stream %u", index);
  return index == KVS_STREAM_COMPUTE ? compute_stream() : index == KVS_STREAM_LOAD ? load : save;
}

cudaStream_t kvs_device::compute_stream() {
  product_.launch(compute_);
  return compute_;
}

void kvs_device::drain_compute() {
  product_.launch(compute_);
  compute_.drain();
}

void kvs_device::require_no_capture(const char* call) const {
  kvs::require(!is_capturing(), "%s: not between kvs_graph_begin and kvs_graph_end", call);
}

void kvs_device::drain() {
  drain_compute();
  load.drain();
  save.drain();
}

std::shared_ptr<kvs::WakeSignal> kvs::wake_signal_of(kvs_device* device) {
  require(device != nullptr, "device must not be null");
  return device->wake;
}

void kvs::check_rows(const kvs_device& device, uint32_t row_count) {
  require(row_count > 0 && row_count <= device.config.max_rows, "%u rows, 1 to %u", row_count,
          device.config.max_rows);
}

void kvs::check_step_rows(const kvs_device& device, uint32_t row_count) {
  check_rows(device, row_count);
  require(row_count == device.facts.row_count, "%u rows, but the step that has begun has %u", row_count,
          device.facts.row_count);
}

void kvs::check_layer(const kvs_device& device, uint32_t layer) {
  require(layer < device.config.layers, "no layer %u of %u", layer, device.config.layers);
  require(device.block_count > 0, "there are no KV blocks: kvs_kv_create first");
  require(device.config.rotary_dim == 0 || device.has_rope, "the RoPE table is missing: kvs_set_rope first");
}

using kvs::guard;
using kvs::require;
using kvs::with_device;

extern "C" {

uint32_t kvs_abi_version(void) { return KVS_ABI_VERSION; }

kvs_status kvs_open(const kvs_device_config* config, kvs_device** out) {
  return guard([&] {
    require(out != nullptr, "out must not be null");
    kvs::check_config(config);
    kvs::Gpu gpu = kvs::find_gpu(config->gpu_index);
    kvs::check_cuda(cudaSetDevice(gpu.index), "cudaSetDevice");
    *out = new kvs_device(*config, std::move(gpu));
  });
}

// Not with_device: a lost device closes too.
kvs_status kvs_close(kvs_device* device) {
  return guard([&] {
    require(device != nullptr, "device must not be null");
    cudaSetDevice(device->gpu.index);
    delete device;
  });
}

kvs_status kvs_device_info(kvs_device* device, char* json, uint32_t capacity_bytes) {
  return with_device(device, [&](kvs_device& d) {
    require(json != nullptr && capacity_bytes > 0, "json must not be null");
    const char* fp8_scales = d.matmuls.fp8_scales();
    const bool is_scaled_after = std::strcmp(fp8_scales, "after") == 0;
    // numeric_mode names what decides bits, as far as a GPU promises any: change the number with the kernels.
    std::snprintf(json, capacity_bytes,
                  "{\"backend\":\"cuda\",\"name\":\"%s\",\"isa\":\"sm_%d\",\"threads\":%d,"
                  "\"numeric_mode\":\"cuda-sm%d-6%s\",\"memory_bytes\":%llu,\"fp8_scales\":\"%s\","
                  "\"numa_node\":%d,\"scattered_loads\":\"%s\",\"scattered_saves\":\"%s\",\"host_slots_pinned\":%u}",
                  d.gpu.name.c_str(), d.gpu.compute_capability, d.gpu.sm_count, d.gpu.compute_capability,
                  is_scaled_after ? "-fp8-after" : "", static_cast<unsigned long long>(d.gpu.memory_bytes), fp8_scales,
                  d.gpu.numa_node, kvs::name_of(d.copies.load), kvs::name_of(d.copies.save),
                  d.registration == nullptr ? 0 : d.registration->ready_slots());
  });
}

kvs_status kvs_memory_info(kvs_device* device, uint64_t* free_bytes, uint64_t* total_bytes) {
  return with_device(device, [&](kvs_device&) {
    require(free_bytes != nullptr && total_bytes != nullptr, "out must not be null");
    size_t free_now = 0;
    size_t total = 0;
    kvs::check_cuda(cudaMemGetInfo(&free_now, &total), "cudaMemGetInfo");
    *free_bytes = free_now;
    *total_bytes = total;
  });
}

kvs_status kvs_set_rope(kvs_device* device, const double* inverse_frequencies) {
  return with_device(device, [&](kvs_device& d) {
    require(inverse_frequencies != nullptr, "inverse_frequencies must not be null");
    const uint32_t pairs = d.config.rotary_dim / 2;
    for (uint32_t i = 0; i < pairs; ++i)
      require(std::isfinite(inverse_frequencies[i]), "frequency %u is not finite", i);
    d.drain();
    const uint64_t bytes = static_cast<uint64_t>(d.config.max_positions) * pairs * sizeof(float);
    d.rope_cosine = kvs::DeviceMemory(bytes, "the RoPE table");
    d.rope_sine = kvs::DeviceMemory(bytes, "the RoPE table");
    if (pairs != 0) {
      const kvs::DeviceMemory frequencies(pairs * sizeof(double), "the RoPE table");
      kvs::check_cuda(cudaMemcpy(frequencies.as(), inverse_frequencies, frequencies.bytes(), cudaMemcpyHostToDevice),
                      "cudaMemcpy");
      kvs::fill_rope_table(d.rope_cosine.as<float>(), d.rope_sine.as<float>(), frequencies.as<double>(),
                           d.config.max_positions, pairs, d.compute_stream());
      d.drain_compute();
    }
    d.has_rope = true;
  });
}

kvs_status kvs_set_alibi(kvs_device* device, const float* slopes) {
  return with_device(device, [&](kvs_device& d) {
    require(slopes != nullptr, "slopes must not be null");
    for (uint32_t i = 0; i < d.config.heads; ++i) require(std::isfinite(slopes[i]), "slope %u is not finite", i);
    d.drain();
    d.alibi_slopes = kvs::DeviceMemory(d.config.heads * sizeof(float), "ALiBi slopes");
    kvs::check_cuda(cudaMemcpy(d.alibi_slopes.as(), slopes, d.alibi_slopes.bytes(), cudaMemcpyHostToDevice),
                    "cudaMemcpy");
  });
}

kvs_status kvs_alloc(kvs_device* device, uint64_t bytes, uint64_t* address) {
  return with_device(device, [&](kvs_device& d) {
    require(bytes > 0 && address != nullptr, "alloc: bytes must be positive, address not null");
    *address = d.device_allocations.add(kvs::DeviceMemory(bytes, "kvs_alloc"));
  });
}

kvs_status kvs_free(kvs_device* device, uint64_t address) {
  return with_device(device, [&](kvs_device& d) {
    d.require_no_capture("kvs_free");
    d.drain();
    require(d.device_allocations.release(address), "free: not an allocation of this device");
  });
}

kvs_status kvs_alloc_host(kvs_device* device, uint64_t bytes, uint64_t* address) {
  return with_device(device, [&](kvs_device& d) {
    require(bytes > 0 && address != nullptr, "alloc_host: bytes must be positive, address not null");
    *address = d.host_allocations.add(kvs::PinnedMemory(bytes));
  });
}

kvs_status kvs_free_host(kvs_device* device, uint64_t address) {
  return with_device(device, [&](kvs_device& d) {
    d.require_no_capture("kvs_free_host");
    d.drain();
    require(d.host_allocations.release(address), "free_host: not an allocation of this device");
  });
}

}  // extern "C"
