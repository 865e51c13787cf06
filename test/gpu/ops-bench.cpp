// Time of every operation at the shapes of real models, through the C ABI, beside what its bytes (or products) need
// at the rates of this card. Few rows are timed in captured graphs, as decode runs them. Weights take turns, so that
// they come from memory. usage: ops-bench libkvasir_cuda.so [ROWS ...]    with ROWS: products of so many alone

#include <chrono>
#include <functional>
#include <string>

#include "step-builder.h"

namespace {

using check::Side;

struct Model {
  const char* name;
  uint32_t hidden, intermediate, heads, kv_heads, vocab;
};

constexpr Model models[] = {
    {"8B", 4096, 14336, 32, 8, 128256}, {"13B", 5120, 13824, 40, 40, 32000}, {"32B", 5120, 27648, 40, 8, 152064}};
constexpr uint32_t head_dim = 128;
constexpr uint32_t context = 512;
constexpr uint32_t weight_turns = 4;
constexpr uint32_t graph_ops = 16;
constexpr uint32_t graph_rows_max = 64;
constexpr double products_per_us = 780e6;  // of a multiply and an add each counted: the library's best on this chip

/** Median us of one operation: `enqueue(i)` puts the i-th on the stream. */
double time_us(Side& side, bool is_graph, uint32_t key, const std::function<void(uint32_t)>& enqueue) {
  const check::Library& lib = side.lib;
  const auto all = [&] {
    for (uint32_t i = 0; i < graph_ops; ++i) enqueue(i);
  };
  if (is_graph) {
    lib.ok(lib.graph_begin(side.device, key));
    all();
    lib.ok(lib.graph_end(side.device, key));
  } else {
    all();
  }
  side.wait();
  std::vector<float> times;
  constexpr int launches = 4;
  for (int run = 0; run < 7; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < launches; ++i) {
      if (is_graph) {
        lib.ok(lib.graph_launch(side.device, key));
      } else {
        all();
      }
    }
    side.wait();
    const std::chrono::duration<float, std::micro> time = std::chrono::steady_clock::now() - begin;
    times.push_back(time.count() / (launches * graph_ops));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

class ModelBench {
 public:
  ModelBench(const check::Library& library, const Model& model, double bytes_per_us)
      : model_(model), bytes_per_us_(bytes_per_us), side_(library, config_of(model)) {
    std::vector<double> frequencies(head_dim / 2, 0.01);
    side_.lib.ok(side_.lib.set_rope(side_.device, frequencies.data()));
    side_.lib.ok(side_.lib.kv_create(side_.device, 64 * context / 64));
    const uint64_t widest = std::max(2 * model.intermediate, (model.heads + 2 * model.kv_heads) * head_dim);
    const std::vector<float> values = bench_values(2048 * widest);
    x_ = side_.activations(values);
    y_ = side_.activations(values);
    residual_ = side_.floats(bench_values(2048ull * model.hidden));
    norm_ = side_.floats(std::vector<float>(widest, 1.0f));
  }

  void run(uint32_t rows) {
    rows_ = rows;
    is_graph_ = rows <= graph_rows_max;
    const check::BegunStep begun(side_, step_of(rows));
    const uint64_t hidden = model_.hidden;
    const check::Library& lib = side_.lib;
    kvs_device* d = side_.device;
    bytes_line("rms_norm", 6 * rows * hidden + 4 * hidden,
               [&](uint32_t) { lib.ok(lib.rms_norm(d, y_, residual_, norm_, rows, model_.hidden, 1e-5f)); });
    bytes_line("append_kv", 4 * rows * qkv_size(),
               [&](uint32_t) { lib.ok(lib.append_kv(d, y_, x_, 0, 0, 0, rows, 1e-5f)); });
    bytes_line("silu_mul", 6ull * rows * model_.intermediate,
               [&](uint32_t) { lib.ok(lib.silu_mul(d, y_, x_, rows, model_.intermediate)); });
    run_products();
  }

  void run_products_alone(uint32_t rows) {
    rows_ = rows;
    is_graph_ = rows <= graph_rows_max;
    const check::BegunStep begun(side_, step_of(rows));
    run_products();
  }

  void run_output(uint32_t rows) {
    rows_ = rows;
    is_graph_ = true;
    const check::BegunStep begun(side_, step_of(rows));
    logits_ = side_.poisoned(uint64_t{rows} * model_.vocab, KVS_F32);
    matmul_line("logits", model_.vocab, model_.hidden, KVS_MATMUL_F32_OUT, logits_);
  }

  void run_sampling(uint32_t rows) {
    rows_ = rows;
    is_graph_ = false;
    logits_ = side_.floats(bench_values(uint64_t{rows} * model_.vocab, 3.0f));
    uint64_t results = 0;
    side_.lib.ok(side_.lib.alloc_host(side_.device, rows * sizeof(kvs_sample_result), &results));
    for (const char* kind : {"greedy", "temperature", "top_p", "top_k and top_p", "penalties", "20 logprobs"}) {
      check::Step step = step_of(rows);
      for (uint32_t row = 0; row < rows; ++row) {
        step.logit_rows.push_back(static_cast<int32_t>(row));
        step.sampling.push_back(sampling_of(kind, row));
      }
      const check::BegunStep begun(side_, step);
      bytes_line((std::string("sample, ") + kind).c_str(), 4ull * rows * model_.vocab,
                 [&](uint32_t) { side_.lib.ok(side_.lib.sample(side_.device, logits_, results, rows)); });
    }
    side_.lib.ok(side_.lib.free_host(side_.device, results));
  }

 private:
  uint32_t qkv_size() const { return (model_.heads + 2 * model_.kv_heads) * head_dim; }

  void run_products() {
    matmul_line("qkv", qkv_size(), model_.hidden, 0);
    matmul_line("o", model_.hidden, model_.heads * head_dim, KVS_MATMUL_ACCUMULATE, residual_);
    matmul_line("gate and up", 2 * model_.intermediate, model_.hidden, 0);
    matmul_line("down", model_.hidden, model_.intermediate, KVS_MATMUL_ACCUMULATE, residual_);
  }

  static kvs_device_config config_of(const Model& model) {
    kvs_device_config config = check::default_config();
    config.hidden_size = model.hidden;
    config.heads = model.heads;
    config.kv_heads = model.kv_heads;
    config.head_dim = head_dim;
    config.rotary_dim = head_dim;
    config.vocab_size = model.vocab;
    config.max_positions = context;
    config.max_rows = 2048;
    config.max_sequences = 64;
    config.compute_dtype = KVS_BF16;
    config.kv_dtype = KVS_BF16;
    return config;
  }

  static std::vector<float> bench_values(uint64_t count, float deviation = 1.0f) {
    check::Random random(3);
    std::vector<float> values = check::normal(random, std::min<uint64_t>(count, 1 << 20), deviation);
    values.reserve(count);
    while (values.size() < count) values.push_back(values[values.size() - (1 << 20) + 1]);
    return values;
  }

  /** Up to 64 rows decode; more are chunks of a full context each. */
  check::Step step_of(uint32_t rows) const {
    check::Step step;
    const uint32_t each = rows <= 64 ? 1 : std::min(rows, context);
    for (uint32_t s = 0; s < rows / each; ++s) {
      check::Sequence sequence{
          static_cast<int32_t>(s), static_cast<int32_t>(context - each), static_cast<int32_t>(each), {}};
      for (uint32_t j = 0; j < context / 64; ++j)
        sequence.table.push_back(static_cast<int32_t>(s * context / 64 + j));
      step.sequences.push_back(sequence);
    }
    return step;
  }

  static kvs_step_sampling sampling_of(const std::string& kind, uint32_t row) {
    kvs_step_sampling s = check::greedy(static_cast<int32_t>(row));
    if (kind != "greedy") s.temperature = 1.0f;
    if (kind == "top_p" || kind == "top_k and top_p") s.top_p = 0.95f;
    if (kind == "top_k and top_p") s.top_k = 50;
    if (kind == "penalties") s.repetition_penalty = 1.1f;
    if (kind == "20 logprobs") s.top_logprobs = 20;
    s.seed_low = row;
    return s;
  }

  void bytes_line(const char* what, uint64_t bytes, const std::function<void(uint32_t)>& enqueue) {
    print(what, static_cast<double>(bytes) / bytes_per_us_, time_us(side_, is_graph_, ++key_, enqueue), bytes);
  }

  void matmul_line(const char* what, uint32_t outputs, uint32_t inputs, uint32_t flags, uint64_t y = 0) {
    kvs_weight* weights[weight_turns];
    for (uint32_t i = 0; i < weight_turns; ++i) {
      side_.lib.ok(side_.lib.weight_create(side_.device, outputs, inputs, KVS_BF16, &weights[i]));
      side_.lib.ok(side_.lib.weight_fill_random(side_.device, weights[i], i, 0.02f));
    }
    const double y_bytes = flags == 0 ? 2.0 : (flags & KVS_MATMUL_ACCUMULATE) != 0 ? 8.0 : 4.0;  // read and written
    const double bytes = 2.0 * outputs * inputs + rows_ * (2.0 * inputs + y_bytes * outputs);
    const double floor = std::max(bytes / bytes_per_us_, 2.0 * outputs * inputs * rows_ / products_per_us);
    const double time = time_us(side_, is_graph_, ++key_, [&](uint32_t i) {
      side_.lib.ok(side_.lib.matmul(side_.device, y == 0 ? y_ : y, x_, weights[i % weight_turns], 0, rows_, flags));
    });
    print(what, floor, time, bytes, 2.0 * outputs * inputs * rows_);
    for (kvs_weight* weight : weights) side_.lib.ok(side_.lib.weight_free(side_.device, weight));
  }

  void print(const char* what, double floor, double time, double bytes, double operations = 0.0) const {
    std::printf("%-4s %5u %-24s %9.1f %9.1f %7.2f %9.2f", model_.name, rows_, what, floor, time, time / floor,
                bytes / time / 1e6);
    if (operations > 0.0) std::printf(" %9.0f", operations / time / 1e6);
    std::printf("\n");
  }

  const Model model_;
  const double bytes_per_us_;
  Side side_;
  uint32_t rows_ = 0;
  uint32_t key_ = 0;
  bool is_graph_ = false;
  uint64_t x_ = 0, y_ = 0, residual_ = 0, norm_ = 0, logits_ = 0;
};

/** Bytes per us, read plus written, of copies inside the device. */
double copy_bandwidth(const check::Library& library) {
  kvs_device_config config = check::default_config();
  config.layers = 32;
  config.kv_heads = 32;
  config.heads = 32;
  Side side(library, config);
  constexpr int32_t blocks = 32;  // of 32 MiB
  side.lib.ok(side.lib.kv_create(side.device, 2 * blocks));
  uint64_t block_bytes = 0, slot_bytes = 0;
  side.lib.ok(side.lib.block_bytes(side.device, &block_bytes, &slot_bytes));
  std::vector<int32_t> from, to;
  for (int32_t i = 0; i < blocks; ++i) {
    from.push_back(i);
    to.push_back(blocks + i);
  }
  const double time = time_us(side, false, 0, [&](uint32_t) {
    side.lib.ok(side.lib.copy_blocks(side.device, from.data(), to.data(), blocks));
  });
  return 2.0 * static_cast<double>(block_bytes) * blocks / time;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::printf("usage: ops-bench libkvasir_cuda.so [ROWS ...]\n");
    return 2;
  }
  const check::Library library(argv[1]);
  const double bytes_per_us = copy_bandwidth(library);
  std::printf("copies on the device: %.2f TB/s\n", bytes_per_us / 1e6);
  std::printf("%-4s %5s %-24s %9s %9s %7s %9s %9s\n", "", "rows", "what", "floor us", "us", "ratio", "TB/s",
              "TFLOP/s");
  for (const Model& model : models) {
    ModelBench bench(library, model, bytes_per_us);
    for (int i = 2; i < argc; ++i) bench.run_products_alone(static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)));
    if (argc > 2) continue;
    for (const uint32_t rows : {1u, 16u, 64u, 2048u}) bench.run(rows);
    for (const uint32_t rows : {1u, 64u}) bench.run_output(rows);
    if (model.vocab < 100000) continue;
    for (const uint32_t rows : {1u, 64u}) bench.run_sampling(rows);
  }
}
