// The inner loops, compiled once per instruction set from the same sources (kernels/*.h): a table of functions,
// chosen when a device opens. An operation is cut into items that any thread may take in any order; a row's
// bits depend on its own data alone.

#pragma once

#include <cstdint>

#include "../common/step-input.h"
#include "scratch.h"
#include "weight-layout.h"

namespace kvs {

struct EmbedTask {
  float* y;
  WeightView weight;
  const StepInput* step;
  const int32_t* tokens;  // [slot][token_stride]
  uint32_t token_stride;
};

struct NormTask {
  float* y;
  const float* x;
  const float* weight;
  const float* bias;  // may be null
  uint32_t size;
  float epsilon;
};

struct MatmulTask {
  float* y;
  const float* x;
  WeightView weight;
  const float* bias;  // may be null
  uint32_t row_count;
  bool is_accumulating;
  uint32_t thread_count;
};

/** RoPE as tables of [position][pair], from angles computed in double. */
struct RopeTable {
  const float* cosine;
  const float* sine;
};

/** One layer's K and V of all gpu blocks. */
struct KvView {
  char* blocks;           // of this layer
  uint64_t block_stride;  // bytes between blocks
  kvs_dtype dtype;
};

struct AppendKvTask {
  float* q;
  const float* qkv;
  const float* q_norm;  // may be null
  const float* k_norm;
  float epsilon;
  KvView kv;
  RopeTable rope;
  const StepInput* step;
  const kvs_device_config* config;
};

struct AttentionTask {
  float* y;
  const float* q;
  const float* alibi_slopes;  // may be null
  uint32_t window;            // 0: all
  KvView kv;
  RopeTable rope;
  const StepInput* step;
  const kvs_device_config* config;
  uint32_t thread_count;
};

struct ActivationTask {
  float* y;
  const float* x;
  uint32_t size;
};

/** One pass over a row of logits. */
struct LogitStats {
  float max;        // NaN ignored
  uint32_t argmax;  // lowest index
  bool has_nan;
};

struct Kernels {
  const char* isa;
  void (*embed)(const EmbedTask&, uint32_t row);
  void (*rms_norm)(const NormTask&, uint32_t row);
  void (*layer_norm)(const NormTask&, uint32_t row);
  uint32_t (*matmul_items)(const MatmulTask&);
  void (*matmul)(const MatmulTask&, uint32_t item, Scratch&);
  void (*append_kv)(const AppendKvTask&, uint32_t row);
  uint32_t (*attention_items)(const AttentionTask&);
  void (*attention)(const AttentionTask&, uint32_t item, Scratch&);
  void (*silu_mul)(const ActivationTask&, uint32_t row);
  void (*gelu)(const ActivationTask&, uint32_t row);
  LogitStats (*logit_stats)(const float* logits, uint32_t size);
  /** y[i] = exp((logits[i] - max) * scale) unless y is null; returns their sum, added in a fixed order. */
  double (*exp_sum)(float* y, const float* logits, uint32_t size, float max, float scale);
  /** Bytes that one item may take. */
  uint64_t (*scratch_bytes)(const kvs_device_config&);
};

/** Null where the compiler did not target the instruction set. */
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

/** isa: KVS_ISA_*. Throws Failure(KVS_UNSUPPORTED) when this processor lacks the one asked for. */
const Kernels& select_kernels(uint32_t isa);

}  // namespace kvs
