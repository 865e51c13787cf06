// kvs_sample: the stages in order, some rows at a time. Statistics, penalties and biases; sample-choose.cu chooses.

#include <algorithm>

#include "device.h"
#include "sample-kernels.h"
#include "sample-row.cuh"
#include "sample.h"

namespace kvs {

namespace {

constexpr uint32_t stage_rows_max = 64;
constexpr uint32_t parts_max = 32;
constexpr uint32_t part_size_min = 4096;
constexpr uint32_t threads = 512;
constexpr uint32_t seen = 0x80000000u;  // in token_counts: anywhere before; the rest counts the answer's

__device__ LogitStats merged(const LogitStats& a, const LogitStats& b) {
  const bool is_b_first = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
  const float max = is_b_first ? b.max : a.max;
  // Two infinite maxima would give NaN: such a row is not sampled.
  const float sum = a.sum * expf(a.max - max) + b.sum * expf(b.max - max);
  return {max, is_b_first ? b.argmax : a.argmax, a.has_nan | b.has_nan, sum};
}

__device__ LogitStats shuffled(const LogitStats& s, uint32_t offset) {
  constexpr uint32_t all = 0xFFFFFFFFu;
  return {__shfl_xor_sync(all, s.max, offset), __shfl_xor_sync(all, s.argmax, offset),
          __shfl_xor_sync(all, s.has_nan, offset), __shfl_xor_sync(all, s.sum, offset)};
}

/** Of a finite start, so that e^(-inf - -inf) does not arise. */
__device__ LogitStats no_logits() { return {-3.402823466e38f, 0xFFFFFFFFu, 0, 0.0f}; }

__global__ void __launch_bounds__(threads) measure_kernel(const __grid_constant__ SampleStage stage) {
  __shared__ LogitStats warps[threads / 32];
  const uint32_t row = blockIdx.y;
  const bool is_of_changed = blockIdx.z == 1;
  const kvs_step_sampling& sampling = stage.args.step.sampling[stage.first + row];
  if (sampling.sequence < 0 || (is_of_changed && !is_changed(sampling))) return;
  const uint32_t size = stage.args.vocab_size;
  const float* logits = is_of_changed ? stage.changed + static_cast<uint64_t>(row) * size
                                      : stage.args.logits + static_cast<uint64_t>(stage.first + row) * size;
  const uint32_t part_size = (size + stage.parts - 1) / stage.parts;
  const uint32_t begin = min(size, blockIdx.x * part_size);
  const uint32_t end = min(size, begin + part_size);
  LogitStats stats = no_logits();
  for_logits(logits, begin, end, threadIdx.x, threads, [&](float logit, uint32_t id) {
    if (logit > stats.max) {
      stats.sum = stats.sum * expf(stats.max - logit) + 1.0f;
      stats.max = logit;
      stats.argmax = id;
    } else if (logit == stats.max && stats.argmax > id) {
      stats.argmax = id;
      stats.sum += 1.0f;
    } else {
      stats.sum += expf(logit - stats.max);
      stats.has_nan |= logit != logit ? 1u : 0u;
    }
  });
  for (uint32_t offset = 16; offset > 0; offset /= 2) stats = merged(stats, shuffled(stats, offset));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = stats;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t i = 1; i < threads / 32; ++i) stats = merged(stats, warps[i]);
  stage.stats[(row * 2 + blockIdx.z) * stage.parts + blockIdx.x] = stats;
}

__global__ void __launch_bounds__(threads) copy_kernel(const __grid_constant__ SampleStage stage) {
  const uint32_t row = blockIdx.y;
  if (!is_changed(stage.args.step.sampling[stage.first + row])) return;
  const uint32_t size = stage.args.vocab_size;
  const float* from = stage.args.logits + static_cast<uint64_t>(stage.first + row) * size;
  float* to = stage.changed + static_cast<uint64_t>(row) * size;
  for_logits(from, 0, size, blockIdx.x * threads + threadIdx.x, gridDim.x * threads,
             [&](float logit, uint32_t id) { to[id] = logit; });
}

__device__ float penalised(float logit, uint32_t count, const kvs_step_sampling& sampling) {
  if (sampling.repetition_penalty != 1.0f) {
    logit = logit > 0.0f ? logit / sampling.repetition_penalty : logit * sampling.repetition_penalty;
  }
  const uint32_t in_answer = count & ~seen;
  if (in_answer == 0) return logit;
  return logit - (sampling.frequency_penalty * static_cast<float>(in_answer) + sampling.presence_penalty);
}

/** One block a row: tokens so far are counted, then whoever takes a count away applies it. */
__global__ void __launch_bounds__(threads) change_kernel(const __grid_constant__ SampleStage stage) {
  const uint32_t row = blockIdx.x;
  const DeviceStep& step = stage.args.step;
  const kvs_step_sampling& sampling = step.sampling[stage.first + row];
  if (!is_changed(sampling)) return;
  const uint64_t begin = static_cast<uint64_t>(row) * stage.args.vocab_size;
  float* logits = stage.changed + begin;
  if (has_penalties(sampling)) {
    uint32_t* counts = stage.token_counts + begin;
    const uint64_t slot = static_cast<uint64_t>(step.sequences[sampling.sequence].slot);
    const int32_t* tokens = stage.args.tokens + slot * stage.args.token_stride;
    const int32_t token_count = step.row_position[step.logit_row[stage.first + row]] + 1;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < token_count; i += threads) {
      atomicOr(&counts[tokens[i]], seen);
      if (i >= sampling.prompt_length) atomicAdd(&counts[tokens[i]], 1u);
    }
    __syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < token_count; i += threads) {
      const uint32_t count = atomicExch(&counts[tokens[i]], 0u);
      if (count != 0) logits[tokens[i]] = penalised(logits[tokens[i]], count, sampling);
    }
    __syncthreads();
  }
  // One thread, in order: a token may have several biases.
  if (threadIdx.x != 0) return;
  for (int32_t i = sampling.bias_begin; i < sampling.bias_begin + sampling.bias_count; ++i) {
    logits[step.bias_id[i]] += step.bias_value[i];
  }
}

uint32_t stage_rows(const kvs_device_config& config) { return std::min(config.max_sequences, stage_rows_max); }

/** Workspace: changed, token_counts, stats. */
uint64_t row_bytes(uint32_t vocab_size) { return 2ull * vocab_size * sizeof(float); }
uint64_t stats_bytes(uint64_t rows) { return rows * 2 * parts_max * sizeof(LogitStats); }

}  // namespace

uint64_t sampling_workspace_bytes(const kvs_device_config& config) {
  return stage_rows(config) * row_bytes(config.vocab_size) + stats_bytes(stage_rows(config));
}

void change_logits(const SampleStage& stage) {
  const uint32_t copiers = (stage.args.vocab_size + 8 * threads - 1) / (8 * threads);
  copy_kernel<<<dim3(copiers, stage.count), threads, 0, stage.args.stream>>>(stage);
  check_launch("kvs_sample: copy");
  change_kernel<<<stage.count, threads, 0, stage.args.stream>>>(stage);
  check_launch("kvs_sample: change");
}

void measure_logits(const SampleStage& stage) {
  const dim3 grid(stage.parts, stage.count, stage.changed == nullptr ? 1 : 2);
  measure_kernel<<<grid, threads, 0, stage.args.stream>>>(stage);
  check_launch("kvs_sample: measure");
}

void sample(const SampleArgs& args) {
  const uint64_t row_total = row_bytes(args.vocab_size) + stats_bytes(1);
  const uint32_t rows = static_cast<uint32_t>(std::min<uint64_t>(args.workspace_bytes / row_total, args.logit_count));
  const uint32_t parts_wanted = (2 * static_cast<uint32_t>(args.sm_count) + rows - 1) / rows;
  SampleStage stage{};
  stage.args = args;
  stage.parts =
      std::clamp((args.vocab_size + part_size_min - 1) / part_size_min, 1u, std::min(parts_wanted, parts_max));
  stage.stats = reinterpret_cast<LogitStats*>(args.workspace);
  float* changed = reinterpret_cast<float*>(args.workspace + stats_bytes(rows));
  stage.changed = args.has_changes ? changed : nullptr;
  // At the end, where no other count of rows puts anything else: it must stay zero.
  stage.token_counts = reinterpret_cast<uint32_t*>(args.workspace + args.workspace_bytes) -
                       static_cast<uint64_t>(rows) * args.vocab_size;
  for (uint32_t first = 0; first < args.logit_count; first += rows) {
    stage.first = first;
    stage.count = std::min(rows, args.logit_count - first);
    if (args.has_changes) change_logits(stage);
    measure_logits(stage);
    choose_tokens(stage);
  }
}

}  // namespace kvs

extern "C" kvs_status kvs_sample(kvs_device* device, uint64_t logits, uint64_t results, uint32_t logit_count) {
  return kvs::with_device(device, [&](kvs_device& d) {
    kvs::require(logit_count > 0 && logit_count == d.facts.logit_count,
                 "sample: %u logit rows, but the step that has begun has %u", logit_count, d.facts.logit_count);
    // Parameters of the moment are part of the launch.
    d.require_no_capture("kvs_sample");
    kvs::SampleArgs args{};
    args.logits = d.device_memory<const float>(
        logits, static_cast<uint64_t>(logit_count) * d.config.vocab_size * sizeof(float), "logits");
    args.results = reinterpret_cast<kvs_sample_result*>(
        d.host_memory(results, logit_count * sizeof(kvs_sample_result), "results"));
    args.tokens = d.tokens.as<int32_t>();
    args.token_stride = d.token_stride();
    args.vocab_size = d.config.vocab_size;
    args.logit_count = logit_count;
    args.step = d.step.arrays();
    args.has_changes = d.facts.has_changed_logits;
    args.is_greedy = d.facts.is_greedy;
    args.workspace = d.sampling_workspace.as();
    args.workspace_bytes = d.sampling_workspace.bytes();
    args.sm_count = d.gpu.sm_count;
    args.compute_capability = d.gpu.compute_capability;
    args.stream = d.compute_stream();
    kvs::sample(args);
  });
}
