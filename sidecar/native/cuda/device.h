// A CUDA device: its streams, memory, tables, KV blocks and the step in work. Everything the extern "C" entries of
// this folder share.

#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>

#include "../common/failure.h"
#include "../common/host-arena.h"
#include "../common/step-input.h"
#include "../common/wake-signal.h"
#include "../kvasir.h"
#include "arena-registration.h"
#include "copy-choice.h"
#include "device-memory.h"
#include "events.h"
#include "gpu.h"
#include "matmul.h"
#include "staging.h"
#include "step-upload.h"
#include "streams.h"
#include "waiting-product.h"
#include "weight.h"

namespace kvs {

/** What the host knows of the step that has begun. */
struct StepFacts {
  uint32_t row_count = 0;
  uint32_t sequence_count = 0;
  uint32_t logit_count = 0;
  uint32_t max_sequence_rows = 0;
  uint32_t max_context = 0;         // positions of the longest view, the step's rows included
  bool is_decode = false;           // row i is sequence i; padding at the end
  bool has_changed_logits = false;  // some row has penalties or biases
  bool is_greedy = true;            // no row has a temperature or wants logprobs
};

struct Graph {
  cudaGraphExec_t executable = nullptr;
  uint32_t row_count = 0;
  uint32_t logit_count = 0;
};

}  // namespace kvs

struct kvs_device {
  kvs_device(const kvs_device_config& config, kvs::Gpu gpu);
  ~kvs_device();

  /** Throws Failure(KVS_INVALID) unless [address, address + bytes) lies in memory of kvs_alloc. */
  template <class T = char>
  T* device_memory(uint64_t address, uint64_t bytes, const char* name) const {
    return reinterpret_cast<T*>(checked_device_memory(address, bytes, name));
  }
  char* host_memory(uint64_t address, uint64_t bytes, const char* name) const;
  kvs_weight& known(kvs_weight* weight) const;
  cudaStream_t stream(kvs_stream index);
  /** A product that waits is launched first: whoever enqueues here, or waits for the stream, comes behind it. */
  cudaStream_t compute_stream();
  void drain_compute();
  /** See WaitingProduct. */
  void add_product(const kvs::MatmulArgs& args) { product_.add(args, compute_); }
  /** False: the gate is to be enqueued now. */
  bool add_gate(void* gated, const void* y, uint32_t rows, uint32_t size) {
    return product_.add_gate(gated, y, rows, size);
  }

  uint64_t compute_bytes(uint64_t rows, uint64_t size) const {
    return rows * size * kvs::dtype_bytes(config.compute_dtype);
  }
  /** Tokens of all slots: [slot][token_stride()]. One more than positions: the token sampled last. */
  uint32_t token_stride() const { return config.max_positions + 1; }
  /** Of one layer, gpu block 0. */
  char* kv_layer(uint32_t layer) const { return kv.as() + layer * kvs::layer_bytes_of(config); }

  bool is_capturing() const { return capture_key.has_value(); }
  /** Throws Failure(KVS_INVALID) between kvs_graph_begin and kvs_graph_end. */
  void require_no_capture(const char* call) const;
  /** Blocks until all streams are idle. */
  void drain();

  const kvs_device_config config;
  const kvs::Gpu gpu;
  /** Why the device is lost; empty while it is not. */
  std::string failure;
  std::shared_ptr<kvs::WakeSignal> wake = std::make_shared<kvs::WakeSignal>();

  kvs::CudaStream load;
  kvs::CudaStream save;
  kvs::Events events;
  kvs::Staging staging;
  kvs::StepUpload step;
  kvs::StepFacts facts;  // of the step that has begun: what operations are checked against

  kvs::AddressMap<kvs::DeviceMemory> device_allocations;
  kvs::AddressMap<kvs::PinnedMemory> host_allocations;
  std::set<kvs_weight*> weights;

  bool has_rope = false;
  kvs::DeviceMemory rope_cosine;
  kvs::DeviceMemory rope_sine;
  kvs::DeviceMemory alibi_slopes;
  kvs::DeviceMemory tokens;
  kvs::DeviceMemory attention_workspace;
  kvs::DeviceMemory sampling_workspace;
  kvs::DeviceMemory kv;
  uint32_t block_count = 0;
  std::unique_ptr<kvs::HostArena> arena;
  std::unique_ptr<kvs::ArenaRegistration> registration;
  /** Of slices between the arena and the blocks. */
  kvs::CopyChoice copies;

  kvs::Matmuls matmuls;
  std::unordered_map<uint32_t, kvs::Graph> graphs;
  std::optional<uint32_t> capture_key;

 private:
  uint64_t checked_device_memory(uint64_t address, uint64_t bytes, const char* name) const;

  kvs::CudaStream compute_;
  kvs::WaitingProduct product_;
};

namespace kvs {

/** Wraps every entry that uses the GPU: no exception passes, and a device that was lost stays lost. */
template <class Body>
kvs_status with_device(kvs_device* device, Body&& body) noexcept {
  return guard([&] {
    require(device != nullptr, "device must not be null");
    if (__builtin_expect(!device->failure.empty(), 0)) fail(KVS_DEVICE_FAILED, "%s", device->failure.c_str());
    check_cuda(cudaSetDevice(device->gpu.index), "cudaSetDevice");
    try {
      return body(*device);
    } catch (const Failure& failure) {
      if (failure.status() == KVS_DEVICE_FAILED) device->failure = failure.what();
      throw;
    }
  });
}

/** Rows within the configuration's limit. */
void check_rows(const kvs_device& device, uint32_t row_count);
/** Rows of an operation that reads the step: it must have begun and be of this size. */
void check_step_rows(const kvs_device& device, uint32_t row_count);
/** A layer, with KV blocks and tables in place. */
void check_layer(const kvs_device& device, uint32_t layer);

}  // namespace kvs
