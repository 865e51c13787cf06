// One library with an open device: the same inputs go to two of these, the outputs are compared.

#pragma once

#include <random>
#include <vector>

#include "abi.h"
#include "number-types.h"

namespace check {

using Random = std::mt19937_64;

/** About normal: the sum of four uniforms of 16 bits, which is quick to draw. */
inline std::vector<float> normal(Random& random, size_t count, float deviation = 1.0f) {
  const float scale = deviation * 1.7320508f / 65536.0f;
  std::vector<float> values(count);
  for (float& value : values) {
    const uint64_t bits = random();
    const uint64_t sum = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48);
    value = (static_cast<float>(sum) - 131070.0f) * scale;
  }
  return values;
}

inline std::vector<float> rounded(std::vector<float> values, kvs_dtype dtype) {
  for (float& value : values) value = rounded(value, dtype);
  return values;
}

inline kvs_device_config default_config() {
  kvs_device_config c{};
  c.struct_bytes = sizeof c;
  c.layers = 1;
  c.hidden_size = 64;
  c.heads = 1;
  c.kv_heads = 1;
  c.head_dim = 64;
  c.vocab_size = 1000;
  c.block_tokens = 64;
  c.max_positions = 64;
  c.max_rows = 64;
  c.max_sequences = 8;
  c.compute_dtype = KVS_F32;
  c.kv_dtype = KVS_F32;
  c.attention_scale = 0.125f;
  return c;
}

class Side {
 public:
  /** compute_dtype of the config is what `library` computes in: the CPU library knows F32 alone. */
  Side(const Library& library, const kvs_device_config& config) : lib(library), config(config) {
    lib.ok(lib.open(&config, &device));
    lib.ok(lib.event_create(device, &event));
  }
  ~Side() { lib.close(device); }
  Side(const Side&) = delete;
  Side& operator=(const Side&) = delete;

  uint64_t alloc(uint64_t bytes) {
    uint64_t address = 0;
    lib.ok(lib.alloc(device, bytes, &address));
    allocations_.push_back(address);
    return address;
  }
  uint64_t place(const std::vector<float>& values, kvs_dtype dtype) {
    const std::vector<char> bytes = encoded(values, dtype);
    const uint64_t address = alloc(bytes.size());
    lib.ok(lib.copy_in(device, address, bytes.data(), bytes.size()));
    return address;
  }
  uint64_t activations(const std::vector<float>& values) { return place(values, config.compute_dtype); }
  uint64_t floats(const std::vector<float>& values) { return place(values, KVS_F32); }
  /** Every byte 0xFF: NaN in each type, so that what nobody wrote shows. */
  uint64_t poisoned(uint64_t count, kvs_dtype dtype) {
    const std::vector<char> bytes(count * bytes_of(dtype), static_cast<char>(0xFF));
    const uint64_t address = alloc(bytes.size());
    lib.ok(lib.copy_in(device, address, bytes.data(), bytes.size()));
    return address;
  }
  uint64_t poisoned(uint64_t count) { return poisoned(count, config.compute_dtype); }

  /** Waits for what is enqueued. */
  std::vector<float> read(uint64_t address, uint64_t count, kvs_dtype dtype) {
    const uint64_t bytes = count * bytes_of(dtype);
    uint64_t host = 0;
    lib.ok(lib.alloc_host(device, bytes, &host));
    lib.ok(lib.copy_out(device, host, address, bytes));
    wait();
    std::vector<float> values = decoded(reinterpret_cast<const void*>(host), count, dtype);
    lib.ok(lib.free_host(device, host));
    return values;
  }
  std::vector<float> read(uint64_t address, uint64_t count) { return read(address, count, config.compute_dtype); }

  kvs_weight* weight(uint32_t rows, uint32_t cols, kvs_dtype dtype, const std::vector<float>& values) {
    kvs_weight* made = nullptr;
    lib.ok(lib.weight_create(device, rows, cols, dtype, &made));
    weights_.push_back(made);
    lib.ok(lib.weight_upload(device, made, 0, rows, values.data(), KVS_F32));
    return made;
  }
  kvs_weight* random_weight(uint32_t rows, uint32_t cols, kvs_dtype dtype, uint64_t seed, float deviation) {
    kvs_weight* made = nullptr;
    lib.ok(lib.weight_create(device, rows, cols, dtype, &made));
    weights_.push_back(made);
    lib.ok(lib.weight_fill_random(device, made, seed, deviation));
    return made;
  }

  void wait() {
    lib.ok(lib.record(device, KVS_STREAM_COMPUTE, event, 1));
    finish(event);
  }
  void finish(uint32_t which) {
    for (;;) {
      const kvs_status status = lib.event_query(device, which);
      if (status == KVS_OK) return;
      if (status != KVS_PENDING) lib.ok(status);
      const kvs_status waited = lib.wait(device, 20'000'000);
      if (waited != KVS_OK) lib.ok(waited);
    }
  }
  void free_memory() {
    wait();
    for (const uint64_t address : allocations_) lib.ok(lib.free(device, address));
    allocations_.clear();
  }
  /** Frees the weights, too. */
  void reset() {
    free_memory();
    for (kvs_weight* made : weights_) lib.ok(lib.weight_free(device, made));
    weights_.clear();
  }

  const Library& lib;
  const kvs_device_config config;
  kvs_device* device = nullptr;
  uint32_t event = 0;

 private:
  std::vector<uint64_t> allocations_;
  std::vector<kvs_weight*> weights_;
};

}  // namespace check
