// From measured logits to a token and its logprobs: some blocks of 1024 threads a row, see sample-team.cuh.

#include <algorithm>

#include "../common/random.h"
#include "cuda-error.h"
#include "sample-kernels.h"
#include "sample-select.cuh"

namespace kvs {

namespace {

constexpr uint32_t top_max = 20;
constexpr uint32_t team_max = 8;  // blocks of a cluster on any GPU that has clusters

struct RowStats {
  float max;
  uint32_t argmax;
  bool is_usable;  // no NaN, a finite maximum
  float total;     // sum of e^(logit - max)
};

/** All threads; each warp merges for itself. */
__device__ RowStats merged_stats(const LogitStats* parts, uint32_t count) {
  constexpr uint32_t all = 0xFFFFFFFFu;
  const uint32_t lane = threadIdx.x % 32;
  LogitStats own{-3.402823466e38f, 0xFFFFFFFFu, 0, 0.0f};
  if (lane < count) own = parts[lane];
  float max = own.max;
  uint32_t has_nan = own.has_nan;
  for (uint32_t offset = 16; offset > 0; offset /= 2) {
    max = fmaxf(max, __shfl_xor_sync(all, max, offset));
    has_nan |= __shfl_xor_sync(all, has_nan, offset);
  }
  uint32_t argmax = own.max == max ? own.argmax : 0xFFFFFFFFu;
  float total = own.sum * expf(own.max - max);
  for (uint32_t offset = 16; offset > 0; offset /= 2) {
    argmax = min(argmax, __shfl_xor_sync(all, argmax, offset));
    total += __shfl_xor_sync(all, total, offset);
  }
  // A row of -inf alone never found a logit above the start.
  return {max, argmax, has_nan == 0 && isfinite(max) && argmax != 0xFFFFFFFFu, total};
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

/** top_k, then top_p over the rest renormalised, then min_p. */
__device__ Kept restrict_row(const LogitRow& row, const Team& team, const kvs_step_sampling& sampling,
                             SelectMemory& memory) {
  const uint32_t top_k = static_cast<uint32_t>(sampling.top_k);
  const bool has_top_k = top_k != 0 && top_k < row.size;
  const bool has_top_p = sampling.top_p < 1.0f;
  if (!has_top_k && !has_top_p) return {rank_last, sampling.min_p};
  count_distances(row, team, memory);
  if (has_top_k && !select_likeliest(row, team, memory, top_k, false)) count_distances(row, team, memory);
  if (has_top_p) {
    if (!has_top_k) find_bin(team, memory, 1, false, 0, 0);  // for the total
    const uint64_t mass = has_top_k ? memory.selected_mass : memory.total_mass;
    const double target = ceil(static_cast<double>(mass) * static_cast<double>(sampling.top_p));
    const uint64_t wanted = max(1ull, static_cast<unsigned long long>(target));
    __syncthreads();
    select_likeliest(row, team, memory, min(wanted, mass), true);
  }
  return {memory.last_rank, sampling.min_p};
}

/** The ids [begin, end) in which the mass counted from the share's start passes the target. */
struct Range {
  uint32_t begin;
  uint32_t end;
  uint64_t mass_before;
};

/** Narrows a range to that of one warp's part. The target lies below the range's end. One block. */
__device__ Range narrow(const LogitRow& row, const Kept& kept, const Range& range, uint64_t target,
                        SelectMemory& memory) {
  constexpr uint32_t warps = scan_threads / 32;
  const uint32_t part = (range.end - range.begin + warps - 1) / warps;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t begin = min(range.end, range.begin + warp * part);
  const uint32_t end = min(range.end, begin + part);
  uint64_t mass = 0;
  for_logits(row.logits, begin, end, lane, 32, [&](float logit, uint32_t id) { mass += kept.mass(row, logit, id); });
  mass = warp_sum(mass);
  const uint64_t before = range.mass_before + block_exclusive_sum(lane == 0 ? mass : 0, memory.partials);
  __syncthreads();
  if (lane == 0 && before <= target && target < before + mass) {
    memory.gathered[0] = begin;
    memory.gathered[1] = end;
    memory.mass_before = before;
  }
  __syncthreads();
  const Range narrowed{static_cast<uint32_t>(memory.gathered[0]), static_cast<uint32_t>(memory.gathered[1]),
                       memory.mass_before};
  __syncthreads();
  return narrowed;
}

/** Inverse CDF in order of token id; the token is known to the first member. */
__device__ uint32_t draw(const LogitRow& row, const Team& team, const Kept& kept, float uniform,
                         SelectMemory& memory) {
  uint64_t mass = 0;
  for_logits(row.logits, row.begin, row.end, threadIdx.x, scan_threads,
             [&](float logit, uint32_t id) { mass += kept.mass(row, logit, id); });
  mass += block_exclusive_sum(mass, memory.partials);
  if (threadIdx.x == scan_threads - 1) memory.mass = mass;
  team.sync();
  uint64_t before = 0;
  uint64_t total = 0;
  for (uint32_t member = 0; member < team.size; ++member) {
    if (member == team.rank) before = total;
    total += team.in(&memory, member)->mass;
  }
  // uniform < 1, so the target is below the total; the product rounds, hence the minimum.
  const uint64_t target =
      min(static_cast<uint64_t>(static_cast<double>(total) * static_cast<double>(uniform)), total - 1);
  if (before <= target && target < before + memory.mass) {
    Range range{row.begin, row.end, before};
    while (range.end - range.begin > 1) range = narrow(row, kept, range, target, memory);
    if (threadIdx.x == 0) team.in(&memory, 0)->token = range.begin;
  }
  team.sync();
  return memory.token;
}

/** The likeliest tokens with their logprobs, likeliest first. row.scale is 1. */
__device__ void write_top(kvs_sample_result& result, const LogitRow& row, const Team& team, uint32_t count,
                          float log_total, SelectMemory& memory) {
  count_distances(row, team, memory);
  select_likeliest(row, team, memory, count, false);
  const uint64_t last_rank = memory.last_rank;
  gather_ranks(row, team, memory, [&](float, uint64_t rank) { return rank <= last_rank; });
  if (team.rank == 0 && threadIdx.x < count) {
    const uint32_t id = id_of_rank(memory.gathered[threadIdx.x]);
    result.top_ids[threadIdx.x] = static_cast<int32_t>(id);
    result.top_logprobs[threadIdx.x] = row.logits[id] - log_total;
  }
}

__device__ LogitRow row_of(const float* logits, uint32_t size, const Team& team, float max, float scale) {
  const uint32_t share = (size + team.size - 1) / team.size;
  const uint32_t begin = min(size, team.rank * share);
  return {logits, size, begin, min(size, begin + share), max, scale};
}

/** Known to the first member; -1 when penalties left no finite logit. */
__device__ int32_t choose(const SampleStage& stage, const Team& team, uint32_t row_index,
                          const kvs_step_sampling& sampling, const float* logits, RowStats stats,
                          SelectMemory& memory) {
  if (is_changed(sampling)) {
    logits = stage.changed + static_cast<uint64_t>(row_index) * stage.args.vocab_size;
    stats = merged_stats(stage.stats + (row_index * 2 + 1) * stage.parts, stage.parts);
    if (!stats.is_usable) return -1;
  }
  if (sampling.temperature == 0.0f) return static_cast<int32_t>(stats.argmax);
  const float scale = fminf(1.0f / sampling.temperature, 3.402823466e38f);
  const LogitRow row = row_of(logits, stage.args.vocab_size, team, stats.max, scale);
  const Kept kept = restrict_row(row, team, sampling, memory);
  const float u = uniform(philox(sampling.seed_low, sampling.seed_high, sampling.rng_position));
  return static_cast<int32_t>(draw(row, team, kept, u, memory));
}

/** One thread. */
__device__ void write_token(const SampleStage& stage, uint32_t index, const kvs_step_sampling& sampling,
                            int32_t token, float logprob, uint32_t top_count) {
  const SampleArgs& args = stage.args;
  kvs_sample_result& result = args.results[index];
  result.token = token;
  result.logprob = logprob;
  result.top_count = static_cast<int32_t>(top_count);
  result.reserved = 0;
  if (sampling.sampled == 0) return;
  const uint64_t slot = static_cast<uint64_t>(args.step.sequences[sampling.sequence].slot);
  const int32_t position = args.step.row_position[args.step.logit_row[index]];
  // The next step may be enqueued already and reads this token: it must be one that exists.
  args.tokens[slot * args.token_stride + position + 1] = max(token, 0);
}

__global__ void __launch_bounds__(scan_threads) choose_kernel(const __grid_constant__ SampleStage stage) {
  __shared__ SelectMemory memory;
  const Team team = Team::of_block();
  const uint32_t row_index = blockIdx.x / team.size;
  const uint32_t index = stage.first + row_index;
  const SampleArgs& args = stage.args;
  const kvs_step_sampling sampling = args.step.sampling[index];
  if (sampling.sequence < 0) return;
  const float* logits = args.logits + static_cast<uint64_t>(index) * args.vocab_size;
  const RowStats stats = merged_stats(stage.stats + row_index * 2 * stage.parts, stage.parts);
  int32_t token = -1;
  if (stats.is_usable && sampling.sampled != 0)
    token = choose(stage, team, row_index, sampling, logits, stats, memory);
  const bool has_logprobs = stats.is_usable && sampling.top_logprobs >= 0;
  const uint32_t top_count = has_logprobs ? min(static_cast<uint32_t>(sampling.top_logprobs), args.vocab_size) : 0;
  const float log_total = stats.max + logf(stats.total);
  kvs_sample_result& result = args.results[index];
  if (team.rank == 0) {
    const bool has_logprob = has_logprobs && token >= 0;
    if (threadIdx.x == 0) {
      write_token(stage, index, sampling, token, has_logprob ? logits[token] - log_total : 0.0f, top_count);
    }
    if (threadIdx.x >= top_count && threadIdx.x < top_max) {
      result.top_ids[threadIdx.x] = 0;
      result.top_logprobs[threadIdx.x] = 0.0f;
    }
  }
  if (top_count > 0) {
    write_top(result, row_of(logits, args.vocab_size, team, stats.max, 1.0f), team, top_count, log_total, memory);
  }
  team.sync();  // no member's shared memory goes while another reads it
}

/** Blocks for each row: as many as find room at once. */
uint32_t team_size(const SampleStage& stage) {
  if (stage.args.compute_capability < 90 || stage.args.is_greedy) return 1;
  uint32_t size = team_max;
  while (size > 1 && size * stage.count > 2 * static_cast<uint32_t>(stage.args.sm_count)) size /= 2;
  return size;
}

}  // namespace

void choose_tokens(const SampleStage& stage) {
  const uint32_t team = team_size(stage);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = team;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(team * stage.count);
  config.blockDim = dim3(scan_threads);
  config.stream = stage.args.stream;
  config.attrs = &attribute;
  config.numAttrs = team > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, choose_kernel, stage), "kvs_sample: choose");
}

}  // namespace kvs
