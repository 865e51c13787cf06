// Sampling, compiled once: the passes over a whole vocabulary are kernels, the rest is order and bookkeeping.

#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/random.h"

namespace kvs {

namespace {

/** Candidates are sorted in pieces of at least this size, so that a top_p of a peaked distribution sorts few. */
constexpr uint32_t first_sorted = 256;

/** A row's changed logits and what choosing needs; each array has vocab_size elements. */
struct Workspace {
  float* logits;
  float* weights;   // e^((logit - max) / temperature)
  int32_t* counts;  // of tokens so far
  uint32_t* order;
};

Workspace make_workspace(uint32_t vocab_size, Scratch& scratch) {
  Workspace workspace;
  workspace.logits = scratch.take<float>(vocab_size);
  workspace.weights = scratch.take<float>(vocab_size);
  workspace.counts = scratch.take<int32_t>(vocab_size);
  workspace.order = scratch.take<uint32_t>(vocab_size);
  return workspace;
}

bool has_penalties(const kvs_step_sampling& sampling) {
  return sampling.repetition_penalty != 1.0f || sampling.frequency_penalty != 0.0f ||
         sampling.presence_penalty != 0.0f;
}

void count_tokens(int32_t* counts, uint32_t vocab_size, const int32_t* begin, const int32_t* end) {
  std::memset(counts, 0, vocab_size * sizeof(int32_t));
  for (const int32_t* token = begin; token < end; ++token) ++counts[*token];
}

/** Repetition over all tokens, frequency and presence over those of the answer. */
void apply_penalties(const Workspace& workspace, const kvs_step_sampling& sampling, uint32_t vocab_size,
                     const int32_t* tokens, int32_t token_count) {
  float* logits = workspace.logits;
  if (sampling.repetition_penalty != 1.0f) {
    count_tokens(workspace.counts, vocab_size, tokens, tokens + token_count);
    for (uint32_t id = 0; id < vocab_size; ++id) {
      if (workspace.counts[id] == 0) continue;
      logits[id] = logits[id] > 0.0f ? logits[id] / sampling.repetition_penalty
                                     : logits[id] * sampling.repetition_penalty;
    }
  }
  if (sampling.frequency_penalty == 0.0f && sampling.presence_penalty == 0.0f) return;
  count_tokens(workspace.counts, vocab_size, tokens + std::min(sampling.prompt_length, token_count),
               tokens + token_count);
  for (uint32_t id = 0; id < vocab_size; ++id) {
    if (workspace.counts[id] == 0) continue;
    logits[id] -= sampling.frequency_penalty * static_cast<float>(workspace.counts[id]) + sampling.presence_penalty;
  }
}

/** Likeliest first; of equals the lowest id. */
struct Likelier {
  const float* values;
  bool operator()(uint32_t a, uint32_t b) const {
    return values[a] != values[b] ? values[a] > values[b] : a < b;
  }
};

/** Sorts the likeliest of order[0, count) to its front until their weights reach `mass`; how many that takes. */
uint32_t reach_mass(const Workspace& workspace, uint32_t count, double mass) {
  const Likelier likelier{workspace.weights};
  double reached = 0.0;
  uint32_t kept = 0;
  for (uint32_t begin = 0, end = std::min(first_sorted, count); begin < count;
       begin = end, end = std::min(count, 8 * end)) {
    std::partial_sort(workspace.order + begin, workspace.order + end, workspace.order + count, likelier);
    while (kept < end) {
      reached += static_cast<double>(workspace.weights[workspace.order[kept++]]);
      if (reached >= mass) return kept;
    }
  }
  return count;
}

/** Sets the weight of every token outside top_k, top_p and min_p to zero. The largest weight is 1. */
void restrict_weights(const Workspace& workspace, const kvs_step_sampling& sampling, uint32_t vocab_size) {
  float* weights = workspace.weights;
  const uint32_t top_k = static_cast<uint32_t>(sampling.top_k);
  uint32_t count = vocab_size;
  if (sampling.top_p < 1.0f || (top_k != 0 && top_k < vocab_size)) {
    uint32_t* order = workspace.order;
    for (uint32_t id = 0; id < vocab_size; ++id) order[id] = id;
    if (top_k != 0 && top_k < count) {
      std::nth_element(order, order + top_k, order + count, Likelier{weights});
      count = top_k;
    }
    if (sampling.top_p < 1.0f) {
      double total = 0.0;
      for (uint32_t i = 0; i < count; ++i) total += static_cast<double>(weights[order[i]]);
      count = reach_mass(workspace, count, total * static_cast<double>(sampling.top_p));
    }
    for (uint32_t i = count; i < vocab_size; ++i) weights[order[i]] = 0.0f;
  }
  if (sampling.min_p == 0.0f) return;
  for (uint32_t id = 0; id < vocab_size; ++id) {
    if (weights[id] < sampling.min_p) weights[id] = 0.0f;
  }
}

/** Inverse CDF in order of token id. */
int32_t draw(const float* weights, uint32_t vocab_size, float uniform) {
  double total = 0.0;
  for (uint32_t id = 0; id < vocab_size; ++id) total += static_cast<double>(weights[id]);
  const double target = total * static_cast<double>(uniform);
  double sum = 0.0;
  int32_t last = 0;
  for (uint32_t id = 0; id < vocab_size; ++id) {
    if (weights[id] == 0.0f) continue;
    sum += static_cast<double>(weights[id]);
    last = static_cast<int32_t>(id);
    if (sum > target) break;
  }
  return last;
}

/** The token, or -1 when penalties left no finite logit. */
int32_t choose(const Kernels& kernels, const SampleTask& task, const kvs_step_sampling& sampling, const float* logits,
               const LogitStats& stats, const int32_t* tokens, int32_t token_count, Scratch& scratch) {
  const uint32_t vocab_size = task.config->vocab_size;
  const bool is_changed = has_penalties(sampling) || sampling.bias_count > 0;
  if (!is_changed && sampling.temperature == 0.0f) return static_cast<int32_t>(stats.argmax);
  const Workspace workspace = make_workspace(vocab_size, scratch);
  LogitStats changed = stats;
  if (is_changed) {
    std::memcpy(workspace.logits, logits, vocab_size * sizeof(float));
    if (has_penalties(sampling)) apply_penalties(workspace, sampling, vocab_size, tokens, token_count);
    for (int32_t i = sampling.bias_begin; i < sampling.bias_begin + sampling.bias_count; ++i) {
      workspace.logits[task.step->bias_id[i]] += task.step->bias_value[i];
    }
    logits = workspace.logits;
    changed = kernels.logit_stats(logits, vocab_size);
    if (changed.has_nan || !std::isfinite(changed.max)) return -1;
  }
  if (sampling.temperature == 0.0f) return static_cast<int32_t>(changed.argmax);
  const float scale = std::min(1.0f / sampling.temperature, std::numeric_limits<float>::max());
  kernels.exp_sum(workspace.weights, logits, vocab_size, changed.max, scale);
  restrict_weights(workspace, sampling, vocab_size);
  const float uniform = kvs::uniform(philox(sampling.seed_low, sampling.seed_high, sampling.rng_position));
  return draw(workspace.weights, vocab_size, uniform);
}

/** The likeliest tokens with their logprobs, likeliest first. */
void write_top(kvs_sample_result& result, const float* logits, uint32_t vocab_size, int32_t count,
               float log_total) {
  const Likelier likelier{logits};
  uint32_t top[20];
  uint32_t kept = 0;
  for (uint32_t id = 0; id < vocab_size; ++id) {
    const bool is_full = kept == static_cast<uint32_t>(count);
    if (is_full && (kept == 0 || !likelier(id, top[kept - 1]))) continue;
    uint32_t at = is_full ? kept - 1 : kept++;
    for (; at > 0 && likelier(id, top[at - 1]); --at) top[at] = top[at - 1];
    top[at] = id;
  }
  result.top_count = static_cast<int32_t>(kept);
  for (uint32_t i = 0; i < kept; ++i) {
    result.top_ids[i] = static_cast<int32_t>(top[i]);
    result.top_logprobs[i] = logits[top[i]] - log_total;
  }
}

}  // namespace

uint64_t sample_scratch_bytes(const kvs_device_config& config) { return 16ull * config.vocab_size + 4 * 64; }

void sample(const Kernels& kernels, const SampleTask& task, uint32_t row, Scratch& scratch) {
  const kvs_step_sampling& sampling = task.step->sampling[row];
  if (sampling.sequence < 0) return;
  const uint32_t vocab_size = task.config->vocab_size;
  const float* logits = task.logits + static_cast<uint64_t>(row) * vocab_size;
  const int32_t position = task.step->row_position[task.step->logit_row[row]];
  const uint64_t slot = static_cast<uint64_t>(task.step->sequences[sampling.sequence].slot);
  int32_t* tokens = task.tokens + slot * task.token_stride;
  kvs_sample_result& result = task.results[row];
  result = {};
  result.token = -1;
  const LogitStats stats = kernels.logit_stats(logits, vocab_size);
  const bool is_usable = !stats.has_nan && std::isfinite(stats.max);
  if (is_usable && sampling.sampled != 0) {
    result.token = choose(kernels, task, sampling, logits, stats, tokens, position + 1, scratch);
  }
  // The next step may be queued already and reads this token: it must be one that exists.
  if (sampling.sampled != 0) tokens[position + 1] = std::max(result.token, 0);
  if (!is_usable || sampling.top_logprobs < 0) return;
  const double total = kernels.exp_sum(nullptr, logits, vocab_size, stats.max, 1.0f);
  const float log_total = stats.max + static_cast<float>(std::log(total));
  if (result.token >= 0) result.logprob = logits[result.token] - log_total;
  write_top(result, logits, vocab_size, sampling.top_logprobs, log_total);
}

}  // namespace kvs
