// From measured logits to a token and its logprobs: one block of 1024 threads a row.

#include "../common/random.h"
#include "cuda-error.h"
#include "sample-kernels.h"
#include "sample-select.cuh"

namespace kvs {

namespace {

constexpr uint32_t top_max = 20;

struct RowStats {
  float max;
  uint32_t argmax;
  bool is_usable;  // no NaN, a finite maximum
  double total;    // sum of e^(logit - max)
};

__device__ RowStats merged_stats(const LogitStats* parts, uint32_t count) {
  RowStats row{parts[0].max, parts[0].argmax, true, 0.0};
  bool has_nan = false;
  for (uint32_t i = 0; i < count; ++i) {
    if (parts[i].max > row.max) {
      row.max = parts[i].max;
      row.argmax = parts[i].argmax;
    }
    has_nan = has_nan || parts[i].has_nan != 0;
  }
  for (uint32_t i = 0; i < count; ++i) {
    row.total += static_cast<double>(parts[i].sum) * static_cast<double>(expf(parts[i].max - row.max));
  }
  // A row of -inf alone never found a logit above the start.
  row.is_usable = !has_nan && isfinite(row.max) && row.argmax != 0xFFFFFFFFu;
  return row;
}

/** Which tokens may be chosen. */
struct Kept {
  uint64_t last_rank;
  float weight_min;

  __device__ uint64_t mass(const LogitRow& row, float logit, uint32_t id) const {
    if (rank_of(logit, id) > last_rank) return 0;
    const float weight = row.weight(logit);
    return weight < weight_min ? 0 : LogitRow::mass_of_weight(weight);
  }
};

/** top_k, then top_p over the rest renormalised, then min_p. All threads. */
__device__ Kept restrict_row(const LogitRow& row, const kvs_step_sampling& sampling, SelectMemory& memory) {
  Selection selection{rank_last, 0};
  const uint32_t top_k = static_cast<uint32_t>(sampling.top_k);
  const bool has_top_k = top_k != 0 && top_k < row.size;
  const bool has_top_p = sampling.top_p < 1.0f;
  if (has_top_k) selection = select_likeliest(row, memory, top_k, false);
  if (has_top_p) {
    if (!has_top_k) {
      uint64_t mass = 0;
      for_logits(row.logits, 0, row.size, threadIdx.x, scan_threads,
                 [&](float logit, uint32_t) { mass += row.mass(logit); });
      mass += block_exclusive_sum(mass, memory.partials);
      if (threadIdx.x == scan_threads - 1) memory.total_mass = mass;
      __syncthreads();
      selection.mass = memory.total_mass;
    }
    const double target = ceil(static_cast<double>(selection.mass) * static_cast<double>(sampling.top_p));
    const uint64_t wanted = max(1ull, static_cast<unsigned long long>(target));
    selection = select_likeliest(row, memory, min(wanted, selection.mass), true);
  }
  return {selection.last_rank, sampling.min_p};
}

/** The ids [begin, end) in which the mass counted from the row's start passes the target. */
struct Range {
  uint32_t begin;
  uint32_t end;
  uint64_t mass_before;
};

/** Narrows a range to that of one warp's share. The target lies below the range's end. */
__device__ Range narrow(const LogitRow& row, const Kept& kept, const Range& range, uint64_t target,
                        SelectMemory& memory) {
  constexpr uint32_t warps = scan_threads / 32;
  const uint32_t share = (range.end - range.begin + warps - 1) / warps;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t begin = min(range.end, range.begin + warp * share);
  const uint32_t end = min(range.end, begin + share);
  uint64_t mass = 0;
  for_logits(row.logits, begin, end, lane, 32, [&](float logit, uint32_t id) { mass += kept.mass(row, logit, id); });
  mass = warp_sum(mass);
  const uint64_t before = range.mass_before + block_exclusive_sum(lane == 0 ? mass : 0, memory.partials);
  __syncthreads();
  if (lane == 0 && before <= target && target < before + mass) {
    memory.list[0] = begin;
    memory.list[1] = end;
    memory.mass_before = before;
  }
  __syncthreads();
  const Range narrowed{static_cast<uint32_t>(memory.list[0]), static_cast<uint32_t>(memory.list[1]),
                       memory.mass_before};
  __syncthreads();
  return narrowed;
}

/** Inverse CDF in order of token id. All threads. */
__device__ uint32_t draw(const LogitRow& row, const Kept& kept, float uniform, SelectMemory& memory) {
  uint64_t mass = 0;
  for_logits(row.logits, 0, row.size, threadIdx.x, scan_threads,
             [&](float logit, uint32_t id) { mass += kept.mass(row, logit, id); });
  mass += block_exclusive_sum(mass, memory.partials);
  if (threadIdx.x == scan_threads - 1) memory.total_mass = mass;
  __syncthreads();
  // uniform < 1, so the target is below the total; the product rounds, hence the minimum.
  const uint64_t total = memory.total_mass;
  const uint64_t target =
      min(static_cast<uint64_t>(static_cast<double>(total) * static_cast<double>(uniform)), total - 1);
  Range range{0, row.size, 0};
  while (range.end - range.begin > 1) range = narrow(row, kept, range, target, memory);
  return range.begin;
}

/** The likeliest tokens with their logprobs, likeliest first. All threads; row.scale is 1. */
__device__ void write_top(kvs_sample_result& result, const LogitRow& row, uint32_t count, float log_total,
                          SelectMemory& memory) {
  count = min(count, row.size);
  const uint64_t last_rank = select_likeliest(row, memory, count, false).last_rank;
  __syncthreads();
  if (threadIdx.x == 0) memory.list_count = 0;
  __syncthreads();
  for_logits(row.logits, 0, row.size, threadIdx.x, scan_threads, [&](float logit, uint32_t id) {
    const uint64_t rank = rank_of(logit, id);
    if (rank <= last_rank) memory.list[atomicAdd(&memory.list_count, 1u)] = rank;
  });
  __syncthreads();
  sort_list(memory);
  if (threadIdx.x < count) {
    const uint32_t id = id_of_rank(memory.list[threadIdx.x]);
    result.top_ids[threadIdx.x] = static_cast<int32_t>(id);
    result.top_logprobs[threadIdx.x] = row.logits[id] - log_total;
  }
}

/** -1 when penalties left no finite logit. All threads. */
__device__ int32_t choose(const SampleStage& stage, uint32_t row_index, const kvs_step_sampling& sampling,
                          const float* logits, RowStats stats, SelectMemory& memory) {
  if (is_changed(sampling)) {
    logits = stage.changed + static_cast<uint64_t>(row_index) * stage.args.vocab_size;
    stats = merged_stats(stage.stats + (row_index * 2 + 1) * stage.parts, stage.parts);
    if (!stats.is_usable) return -1;
  }
  if (sampling.temperature == 0.0f) return static_cast<int32_t>(stats.argmax);
  const LogitRow row{logits, stage.args.vocab_size, stats.max, fminf(1.0f / sampling.temperature, 3.402823466e38f)};
  const Kept kept = restrict_row(row, sampling, memory);
  const float u = uniform(philox(sampling.seed_low, sampling.seed_high, sampling.rng_position));
  return static_cast<int32_t>(draw(row, kept, u, memory));
}

__global__ void __launch_bounds__(scan_threads) choose_kernel(const __grid_constant__ SampleStage stage) {
  __shared__ SelectMemory memory;
  const uint32_t index = stage.first + blockIdx.x;
  const SampleArgs& args = stage.args;
  const kvs_step_sampling sampling = args.step.sampling[index];
  if (sampling.sequence < 0) return;
  const float* logits = args.logits + static_cast<uint64_t>(index) * args.vocab_size;
  const RowStats stats = merged_stats(stage.stats + blockIdx.x * 2 * stage.parts, stage.parts);
  int32_t token = -1;
  if (stats.is_usable && sampling.sampled != 0) token = choose(stage, blockIdx.x, sampling, logits, stats, memory);
  kvs_sample_result& result = args.results[index];
  const bool has_logprobs = stats.is_usable && sampling.top_logprobs >= 0;
  const uint32_t top_count = has_logprobs ? min(static_cast<uint32_t>(sampling.top_logprobs), args.vocab_size) : 0;
  const float log_total = stats.max + static_cast<float>(log(stats.total));
  if (threadIdx.x == 0) {
    result.token = token;
    result.logprob = has_logprobs && token >= 0 ? logits[token] - log_total : 0.0f;
    result.top_count = static_cast<int32_t>(top_count);
    result.reserved = 0;
    if (sampling.sampled != 0) {
      const uint64_t slot = static_cast<uint64_t>(args.step.sequences[sampling.sequence].slot);
      const int32_t position = args.step.row_position[args.step.logit_row[index]];
      // The next step may be enqueued already and reads this token: it must be one that exists.
      args.tokens[slot * args.token_stride + position + 1] = max(token, 0);
    }
  }
  if (threadIdx.x >= top_count && threadIdx.x < top_max) {
    result.top_ids[threadIdx.x] = 0;
    result.top_logprobs[threadIdx.x] = 0.0f;
  }
  if (top_count > 0) write_top(result, {logits, args.vocab_size, stats.max, 1.0f}, top_count, log_total, memory);
}

}  // namespace

void choose_tokens(const SampleStage& stage) {
  choose_kernel<<<stage.count, scan_threads, 0, stage.args.stream>>>(stage);
  check_launch("kvs_sample: choose");
}

}  // namespace kvs
