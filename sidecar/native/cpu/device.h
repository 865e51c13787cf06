// A CPU device: its three streams, compute threads, memory, KV blocks and the step in work. Everything the
// extern "C" entries of this folder share.

#pragma once

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "../common/failure.h"
#include "../common/host-arena.h"
#include "../common/step-input.h"
#include "../common/wake-signal.h"
#include "../kvasir.h"
#include "events.h"
#include "host-memory.h"
#include "kernels.h"
#include "stream.h"
#include "thread-pool.h"
#include "weight.h"

namespace kvs {

/** Allocations by address, so that every pointer that comes in is checked against what was handed out. */
class AddressMap {
 public:
  uint64_t allocate(uint64_t bytes);
  /** False when nothing was allocated at this very address. */
  bool release(uint64_t address) { return allocations_.erase(address) != 0; }
  bool contains(uint64_t address, uint64_t bytes) const;

 private:
  std::map<uint64_t, HostMemory> allocations_;
};

}  // namespace kvs

struct kvs_device {
  explicit kvs_device(const kvs_device_config& config);
  ~kvs_device();

  /** Throws Failure(KVS_INVALID) unless [address, address + bytes) lies in memory of kvs_alloc. */
  float* device_memory(uint64_t address, uint64_t bytes, const char* name) const;
  char* host_memory(uint64_t address, uint64_t bytes, const char* name) const;
  kvs_weight& known(kvs_weight* weight) const;
  kvs::Stream& stream(kvs_stream index);
  /** The tokens of all slots: [slot][token_stride()]. One more than positions: the token sampled last. */
  uint32_t token_stride() const { return config.max_positions + 1; }
  kvs::KvView kv_view(uint32_t layer) const;
  kvs::RopeTable rope_table() const {
    return {reinterpret_cast<float*>(rope_cosine.data()), reinterpret_cast<float*>(rope_sine.data())};
  }
  /** Blocks until all three streams are idle. */
  void drain();

  const kvs_device_config config;
  const kvs::Kernels& kernels;
  std::shared_ptr<kvs::WakeSignal> wake = std::make_shared<kvs::WakeSignal>();
  kvs::Events events;
  kvs::AddressMap device_allocations;
  kvs::AddressMap host_allocations;
  kvs::WeightMemory weight_memory;
  std::set<kvs_weight*> weights;
  std::unique_ptr<kvs::HostArena> arena;

  bool has_rope = false;
  kvs::HostMemory rope_cosine;
  kvs::HostMemory rope_sine;
  std::vector<float> alibi_slopes;
  kvs::HostMemory tokens;
  kvs::HostMemory kv;
  uint32_t block_count = 0;

  kvs::StepInput begun_step;    // the caller's side: what operations are checked against
  kvs::StepInput running_step;  // the compute stream's side

  kvs::ThreadPool pool;  // used on the compute stream only
  kvs::Stream compute;
  kvs::Stream load;
  kvs::Stream save;
};

namespace kvs {

/** Throws Failure(KVS_INVALID) on null. */
kvs_device& checked(kvs_device* device);

/** Puts an operation on a stream; KVS_BUSY when its queue is full. */
template <class Operation>
kvs_status enqueue(Stream& stream, Operation&& operation) {
  if (!stream.has_room()) {
    set_last_error("the stream's queue is full");
    return KVS_BUSY;
  }
  stream.push(std::forward<Operation>(operation));
  return KVS_OK;
}

}  // namespace kvs
