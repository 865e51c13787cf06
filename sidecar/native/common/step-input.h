// One step's input as typed pointers into the caller's host memory, after every index in it was checked:
// kernels of both libraries trust it.

#pragma once

#include <cstdint>

#include "../kvasir.h"

namespace kvs {

struct StepInput {
  uint32_t row_count = 0;
  uint32_t sequence_count = 0;
  uint32_t logit_count = 0;
  const kvs_step_sequence* sequences = nullptr;
  const int32_t* row_sequence = nullptr;
  const int32_t* row_position = nullptr;
  const int32_t* block_table = nullptr;
  const int32_t* logit_row = nullptr;
  const kvs_step_sampling* sampling = nullptr;
  const int32_t* bias_id = nullptr;
  const float* bias_value = nullptr;
};

/** Throws Failure(KVS_INVALID) that names the first wrong field. block_count: gpu blocks that exist. */
StepInput parse_step(const int32_t* step, uint32_t bytes, const kvs_device_config& config, uint32_t block_count);

/** Throws Failure(KVS_INVALID) that names the first field out of range. */
void check_config(const kvs_device_config* config);

inline uint32_t dtype_bytes(kvs_dtype dtype) { return dtype == KVS_F32 ? 4 : dtype == KVS_F8E4M3 ? 1 : 2; }
inline uint64_t f32_bytes(uint64_t rows, uint64_t size) { return rows * size * sizeof(float); }

/** Layout of a block: [layer][K|V][kv head][token][head_dim]. */
inline uint64_t layer_bytes_of(const kvs_device_config& config) {
  return 2ull * config.kv_heads * config.block_tokens * config.head_dim * dtype_bytes(config.kv_dtype);
}
inline uint64_t block_bytes_of(const kvs_device_config& config) { return config.layers * layer_bytes_of(config); }
inline uint64_t slot_bytes_of(const kvs_device_config& config) {
  return (block_bytes_of(config) + 4095) / 4096 * 4096;
}

}  // namespace kvs
