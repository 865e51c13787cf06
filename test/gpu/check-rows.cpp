// Embedding, norms, activations, gathering, random weights: kernels that treat each row alone.

#include "checks.h"
#include "step-builder.h"

namespace check {

namespace {

struct Pair {
  Pair(Context& context, const kvs_device_config& config)
      : cuda(context.cuda, config), cpu(context.cpu, for_cpu(config)) {}
  void reset() {
    cuda.reset();
    cpu.reset();
  }
  Side cuda;
  Side cpu;
};

void check_norms(Context& context, Pair& pair, uint32_t rows, uint32_t size) {
  const kvs_dtype dtype = pair.cuda.config.compute_dtype;
  const std::vector<float> x = normal(context.random, size_t{rows} * size);
  const std::vector<float> weight = normal(context.random, size);
  const std::vector<float> bias = normal(context.random, size);
  const auto run = [&](Side& side, int kind) {
    const uint64_t from = side.floats(x);
    const uint64_t w = side.floats(weight);
    const uint64_t b = kind == 2 ? side.floats(bias) : 0;
    const uint64_t y = side.poisoned(x.size());
    if (kind == 0) {
      side.lib.ok(side.lib.rms_norm(side.device, y, from, w, rows, size, 1e-5f));
    } else {
      side.lib.ok(side.lib.layer_norm(side.device, y, from, w, b, rows, size, 1e-5f));
    }
    return side.read(y, x.size());
  };
  const char* names[] = {"rms_norm", "layer_norm", "layer_norm + bias"};
  for (int kind = 0; kind < 3; ++kind) {
    context.report.rows(names[kind], text("(%u, %u)", rows, size), dtype, run(pair.cuda, kind), run(pair.cpu, kind),
                        size, limits_of(dtype, 16));
  }
  pair.reset();
}

void check_activations(Context& context, Pair& pair, uint32_t rows, uint32_t size) {
  const kvs_dtype dtype = pair.cuda.config.compute_dtype;
  const std::vector<float> x = rounded(normal(context.random, size_t{rows} * 2 * size, 2.0f), dtype);
  const auto run = [&](Side& side, bool is_silu) {
    const uint64_t from = side.activations(x);
    const uint64_t y = side.poisoned(size_t{rows} * size);
    side.lib.ok(is_silu ? side.lib.silu_mul(side.device, y, from, rows, size)
                        : side.lib.gelu(side.device, y, from, rows, size));
    return side.read(y, size_t{rows} * size);
  };
  const std::string of_case = text("(%u, %u)", rows, size);
  context.report.rows("silu_mul", of_case, dtype, run(pair.cuda, true), run(pair.cpu, true), size,
                      limits_of(dtype, 16));
  context.report.rows("gelu", of_case, dtype, run(pair.cuda, false), run(pair.cpu, false), size,
                      limits_of(dtype, 16));
  pair.reset();
}

/** Embedding reads weights, so this also compares uploads and random fills, bit for bit. */
void check_embedding(Context& context, const kvs_device_config& config) {
  Pair pair(context, config);
  const uint32_t rows = config.max_rows;
  const std::vector<float> values = normal(context.random, size_t{config.vocab_size} * config.hidden_size);
  std::vector<int32_t> ids(rows);
  for (int32_t& id : ids) id = static_cast<int32_t>(context.random() % config.vocab_size);
  Step step;
  step.sequences.push_back({2, 1, static_cast<int32_t>(rows) - 1, std::vector<int32_t>(64, -1)});
  step.padding = 1;
  step.logit_rows = {static_cast<int32_t>(rows) - 2, 0, 3};
  const auto run = [&](Side& side, kvs_dtype dtype, bool is_random) {
    kvs_weight* weight = is_random ? side.random_weight(config.vocab_size, config.hidden_size, dtype, 42, 0.02f)
                                   : side.weight(config.vocab_size, config.hidden_size, dtype, values);
    side.lib.ok(side.lib.write_tokens(side.device, 2, 1, ids.data(), rows));
    const BegunStep begun(side, step);
    const uint64_t y = side.poisoned(size_t{rows} * config.hidden_size, KVS_F32);
    side.lib.ok(side.lib.embed(side.device, y, weight, rows));
    const uint64_t gathered = side.poisoned(size_t{3} * config.hidden_size, KVS_F32);
    side.lib.ok(side.lib.gather_logit_rows(side.device, gathered, y, 3, config.hidden_size));
    std::vector<float> out = side.read(y, size_t{rows - 1} * config.hidden_size, KVS_F32);
    const std::vector<float> picked = side.read(gathered, size_t{3} * config.hidden_size, KVS_F32);
    out.insert(out.end(), picked.begin(), picked.end());
    return out;
  };
  const kvs_dtype dtype = config.compute_dtype;
  for (const bool is_random : {false, true}) {
    const std::vector<float> y = run(pair.cuda, dtype, is_random);
    const std::vector<float> reference = run(pair.cpu, dtype, is_random);
    context.report.that(is_random ? "embed random, gather: bits" : "embed, gather: bits",
                        text("%s hidden %u", name_of(dtype), config.hidden_size), y == reference);
  }
}

}  // namespace

void check_rows(Context& context) {
  const std::vector<uint32_t> sizes =
      context.is_small ? std::vector<uint32_t>{40, 64, 4096}
                       : std::vector<uint32_t>{1, 40, 64, 100, 288, 768, 1001, 4096, 5120, 8192, 13824, 28672, 40000};
  for (const kvs_dtype dtype : compute_dtypes) {
    kvs_device_config config = default_config();
    config.compute_dtype = dtype;
    config.max_rows = 300;
    config.max_positions = 400;
    config.vocab_size = 999;
    for (const uint32_t hidden : {40u, 288u, 1024u}) {
      config.hidden_size = hidden;
      config.max_rows = 37;
      check_embedding(context, config);
    }
    config.max_rows = 1000;
    Pair pair(context, config);
    // More rows than blocks that run at once: a block of a norm then has several.
    for (const uint32_t size : {4096u, 5120u}) check_norms(context, pair, 1000, size);
    for (const uint32_t size : sizes) {
      for (const uint32_t rows : {1u, 3u, 64u, 257u}) {
        if (size_t{rows} * size > 1'000'000 && rows > 64) continue;
        check_norms(context, pair, rows, size);
        // The CPU library's erf is good to 2e-7 of 1, not of a lone tiny output.
        if (size >= 40) check_activations(context, pair, rows, size);
      }
    }
  }
}

}  // namespace check
