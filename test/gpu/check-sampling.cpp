// kvs_sample against the CPU library's: every parameter, random logits of several shapes, many seeds.

#include <algorithm>
#include <memory>

#include "checks.h"
#include "step-builder.h"

namespace check {

namespace {

constexpr uint32_t row_count = 32;
constexpr uint32_t history = 50;

float pick(Random& random, std::initializer_list<float> values) {
  return *(values.begin() + random() % values.size());
}

kvs_step_sampling random_sampling(Random& random, int32_t row, Step& step, uint32_t vocab_size) {
  kvs_step_sampling s = greedy(row);
  s.temperature = pick(random, {0.0f, 0.1f, 0.7f, 1.0f, 1.0f, 1.7f, 1e-30f});
  s.top_k = static_cast<int32_t>(pick(random, {0.0f, 0.0f, 1.0f, 2.0f, 50.0f, 5000.0f, 1e6f}));
  s.top_p = pick(random, {1.0f, 1.0f, 0.95f, 0.5f, 1e-6f});
  s.min_p = pick(random, {0.0f, 0.0f, 0.05f, 1.0f});
  s.frequency_penalty = pick(random, {0.0f, 0.0f, 0.5f, -0.5f});
  s.presence_penalty = pick(random, {0.0f, 0.0f, 0.7f});
  s.repetition_penalty = pick(random, {1.0f, 1.0f, 1.3f, 0.8f});
  s.prompt_length = static_cast<int32_t>(random() % history);
  s.seed_low = static_cast<uint32_t>(random());
  s.seed_high = static_cast<uint32_t>(random());
  s.rng_position = static_cast<uint32_t>(random() % 100000);
  s.top_logprobs = static_cast<int32_t>(random() % 22) - 1;
  s.sampled = random() % 8 == 0 ? 0 : 1;
  if (random() % 4 == 0) {
    s.bias_begin = static_cast<int32_t>(step.bias_ids.size());
    s.bias_count = 3;
    for (int i = 0; i < 3; ++i) {
      step.bias_ids.push_back(static_cast<int32_t>(random() % vocab_size));
      step.bias_values.push_back(pick(random, {-100.0f, 5.0f, 0.5f}));
    }
    step.bias_ids.back() = step.bias_ids[step.bias_ids.size() - 3];  // several for one token add up
  }
  return s;
}

/** kind: 0 spread, 1 peaked, 2 coarse (many equal), 3 all equal, 4 wide range. */
std::vector<float> random_logits(Random& random, uint32_t vocab_size, uint32_t kind) {
  std::vector<float> logits = normal(random, vocab_size, kind == 4 ? 60.0f : 2.5f);
  for (float& logit : logits) {
    if (kind == 2) logit = std::round(logit);
    if (kind == 3) logit = -1.5f;
  }
  if (kind == 1) logits[random() % vocab_size] += 18.0f;
  return logits;
}

struct Counts {
  uint32_t tokens = 0;
  uint32_t other_tokens = 0;
};

class Run {
 public:
  Run(Context& context, uint32_t vocab_size) : context_(context), vocab_size_(vocab_size) {
    kvs_device_config config = default_config();
    config.vocab_size = vocab_size;
    config.hidden_size = 16;
    config.max_rows = row_count;
    config.max_sequences = row_count;
    config.max_positions = history + 2;
    cuda_ = std::make_unique<Side>(context.cuda, config);
    cpu_ = std::make_unique<Side>(context.cpu, config);
    for (Side* side : {cuda_.get(), cpu_.get()}) side->lib.ok(side->lib.kv_create(side->device, row_count));
  }

  void run(uint32_t round) {
    Random& random = context_.random;
    Step step;
    std::vector<std::vector<int32_t>> tokens(row_count, std::vector<int32_t>(history));
    logits_.clear();
    const uint32_t used = round % 3 == 0 ? 5 : row_count;
    for (uint32_t row = 0; row < used; ++row) {
      for (int32_t& id : tokens[row]) id = static_cast<int32_t>(random() % std::min(vocab_size_, 60u));
      step.sequences.push_back({static_cast<int32_t>(row), history - 1, 1, {static_cast<int32_t>(row)}});
      step.logit_rows.push_back(static_cast<int32_t>(row));
      step.sampling.push_back(random_sampling(random, static_cast<int32_t>(row), step, vocab_size_));
      if (row % 11 == 10) step.sampling.back().sequence = -1;
      std::vector<float> row_logits = random_logits(random, vocab_size_, static_cast<uint32_t>(random() % 5));
      if (row % 13 == 12) row_logits[random() % vocab_size_] = std::nanf("");
      if (row % 17 == 16) std::fill(row_logits.begin(), row_logits.end(), -INFINITY);
      if (row % 7 == 6) row_logits[random() % vocab_size_] = -INFINITY;
      logits_.insert(logits_.end(), row_logits.begin(), row_logits.end());
    }
    const std::vector<kvs_sample_result> a = sampled(*cuda_, step, tokens);
    const std::vector<kvs_sample_result> b = sampled(*cpu_, step, tokens);
    for (uint32_t row = 0; row < used; ++row) compare(step.sampling[row], row, a[row], b[row]);
  }

  /** Sums of single floats decide by their last bits which of two neighbours in the CDF is met. */
  void finish() {
    context_.report.that("sample: tokens",
                         text("vocab %u: %u of %u differ", vocab_size_, counts_.other_tokens, counts_.tokens),
                         counts_.other_tokens * 200 <= counts_.tokens);
    std::printf("sample, vocab %u: %u of %u tokens differ\n", vocab_size_, counts_.other_tokens, counts_.tokens);
  }

 private:
  std::vector<kvs_sample_result> sampled(Side& side, const Step& step,
                                         const std::vector<std::vector<int32_t>>& tokens) {
    const uint32_t count = static_cast<uint32_t>(step.logit_rows.size());
    for (uint32_t row = 0; row < count; ++row) {
      side.lib.ok(side.lib.write_tokens(side.device, row, 0, tokens[row].data(), history));
    }
    const BegunStep begun(side, step);
    const uint64_t logits = side.floats(logits_);
    uint64_t results = 0;
    const uint64_t bytes = count * sizeof(kvs_sample_result);
    side.lib.ok(side.lib.alloc_host(side.device, bytes, &results));
    std::memset(reinterpret_cast<void*>(results), 0xFF, bytes);
    side.lib.ok(side.lib.sample(side.device, logits, results, count));
    side.wait();
    std::vector<kvs_sample_result> out(count);
    std::memcpy(out.data(), reinterpret_cast<const void*>(results), bytes);
    side.lib.ok(side.lib.free_host(side.device, results));
    next_tokens(side, step, out);
    side.reset();
    return out;
  }

  /** What sampling wrote behind each sequence, read through an embedding whose rows hold their own index. */
  void next_tokens(Side& side, const Step& step, const std::vector<kvs_sample_result>& results) {
    std::vector<float> indices(size_t{vocab_size_} * 16);
    for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<float>(i / 16);
    kvs_weight* weight = side.weight(vocab_size_, 16, KVS_F32, indices);
    Step next = step;
    for (Sequence& s : next.sequences) s.position = history;
    const uint32_t count = static_cast<uint32_t>(step.logit_rows.size());
    const BegunStep begun(side, next);
    const uint64_t y = side.poisoned(size_t{count} * 16);
    side.lib.ok(side.lib.embed(side.device, y, weight, count));
    const std::vector<float> ids = side.read(y, size_t{count} * 16);
    bool are_right = true;
    for (uint32_t row = 0; row < count; ++row) {
      if (step.sampling[row].sequence < 0 || step.sampling[row].sampled == 0) continue;
      are_right = are_right && ids[row * 16] == static_cast<float>(std::max(results[row].token, 0));
    }
    context_.report.that("sample: next token on the device", side.lib.name, are_right);
  }

  void compare(const kvs_step_sampling& s, uint32_t row, const kvs_sample_result& a, const kvs_sample_result& b) {
    const std::string of_case = text("vocab %u: T %g k %d p %g min %g rep %g freq %g pres %g bias %d: %d, cpu %d",
                                     vocab_size_, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty,
                                     s.frequency_penalty, s.presence_penalty, s.bias_count, a.token, b.token);
    if (s.sequence < 0) {
      context_.report.that("sample: padding writes nothing", of_case, a.token == -1 && a.top_count == -1);
      return;
    }
    ++counts_.tokens;
    if (a.token != b.token) {
      ++counts_.other_tokens;
      const bool is_drawn = s.temperature > 0.0f && a.token >= 0 && b.token >= 0;
      context_.report.that("sample: only drawn tokens may differ", of_case, is_drawn);
    } else {
      context_.report.that("sample: logprob", of_case, is_near(a.logprob, b.logprob));
    }
    bool is_same_top = a.top_count == b.top_count;
    for (int32_t i = 0; is_same_top && i < a.top_count; ++i) {
      is_same_top = a.top_ids[i] == b.top_ids[i] && is_near(a.top_logprobs[i], b.top_logprobs[i]);
    }
    context_.report.that("sample: top logprobs",
                         text("row %u count %d, cpu %d; ", row, a.top_count, b.top_count) + of_case, is_same_top);
  }

  /** Also of two infinities. */
  static bool is_near(float a, float b) { return a == b || std::fabs(a - b) <= 1e-4f * (1.0f + std::fabs(b)); }

  Context& context_;
  const uint32_t vocab_size_;
  std::unique_ptr<Side> cuda_;
  std::unique_ptr<Side> cpu_;
  std::vector<float> logits_;
  Counts counts_;
};

}  // namespace

void check_sampling(Context& context) {
  const std::vector<uint32_t> sizes =
      context.is_small ? std::vector<uint32_t>{97, 5000} : std::vector<uint32_t>{1, 2, 97, 5000, 32003, 128256};
  for (const uint32_t vocab_size : sizes) {
    const uint32_t rounds = context.is_small ? 2 : vocab_size > 100'000 ? 6 : 12;
    try {
      Run run(context, vocab_size);
      for (uint32_t round = 0; round < rounds; ++round) run.run(round);
      run.finish();
    } catch (const std::exception& error) {
      context.report.threw("sample: tokens", text("vocab %u", vocab_size), error.what());
    }
  }
}

}  // namespace check
