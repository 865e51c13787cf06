// Streams, events, waiting, graphs, and the way of blocks through the host tier; then what both libraries must refuse
// alike.

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>

#include "checks.h"
#include "step-builder.h"

namespace check {

namespace {

constexpr uint32_t block_count = 48;

kvs_device_config block_config(uint32_t layers, uint32_t block_tokens, uint32_t kv_heads) {
  kvs_device_config config = default_config();
  config.layers = layers;
  config.block_tokens = block_tokens;
  config.heads = kv_heads;
  config.kv_heads = kv_heads;
  config.head_dim = 64;
  config.kv_dtype = KVS_BF16;
  return config;
}

void retry(const Side& side, const std::function<kvs_status()>& call) {
  kvs_status status = call();
  for (; status == KVS_BUSY; status = call()) side.lib.wait(side.device, 10'000'000);
  side.lib.ok(status);
}

/** Random bytes: host slots -> gpu blocks, some copied on the gpu, -> other host slots. Every byte must arrive. */
void check_round_trip(Context& context, uint32_t block_tokens, uint32_t kv_heads, bool are_neighbours) {
  Side side(context.cuda, block_config(3, block_tokens, kv_heads));
  const Library& lib = side.lib;
  lib.ok(lib.kv_create(side.device, block_count));
  kvs_host_arena arena{};
  lib.ok(lib.host_arena_open(side.device, nullptr, 2 * block_count, &arena));
  uint64_t block_bytes = 0, slot_bytes = 0;
  lib.ok(lib.block_bytes(side.device, &block_bytes, &slot_bytes));
  char* slots = reinterpret_cast<char*>(arena.slots_address);
  for (uint64_t i = 0; i < block_count; ++i) {
    for (uint64_t at = 0; at + 8 <= block_bytes; at += 8) {
      const uint64_t value = context.random();
      std::memcpy(slots + i * slot_bytes + at, &value, 8);
    }
  }
  std::vector<int32_t> from(block_count), blocks(block_count), to(block_count);
  std::iota(from.begin(), from.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::iota(to.begin(), to.end(), static_cast<int32_t>(block_count));
  if (!are_neighbours) {
    std::shuffle(from.begin() + block_count / 2, from.end(), context.random);  // neighbours first, then scattered
    std::shuffle(blocks.begin() + block_count / 2, blocks.end(), context.random);
    std::shuffle(to.begin(), to.end(), context.random);
  }
  uint32_t loaded = 0, copied = 0, saved = 0;
  for (uint32_t* event : {&loaded, &copied, &saved}) lib.ok(lib.event_create(side.device, event));
  for (uint32_t layer = 0; layer < 3; ++layer) {
    retry(side, [&] { return lib.load_layer(side.device, layer, from.data(), blocks.data(), block_count, loaded); });
  }
  lib.ok(lib.stream_wait(side.device, KVS_STREAM_COMPUTE, loaded));
  const int32_t swap_from[] = {blocks[3], blocks[1]};
  const int32_t swap_to[] = {blocks[2], blocks[3]};
  lib.ok(lib.copy_blocks(side.device, swap_from, swap_to, 2));
  lib.ok(lib.record(side.device, KVS_STREAM_COMPUTE, copied, 0));
  lib.ok(lib.stream_wait(side.device, KVS_STREAM_SAVE, copied));
  for (uint32_t layer = 0; layer < 3; ++layer) {
    retry(side, [&] { return lib.save_layer(side.device, layer, blocks.data(), to.data(), block_count, saved); });
  }
  side.finish(saved);
  std::vector<int32_t> origin = from;
  origin[2] = from[3];
  origin[3] = from[1];
  bool are_same = true;
  for (uint32_t i = 0; i < block_count; ++i) {
    are_same = are_same && std::memcmp(slots + static_cast<uint64_t>(to[i]) * slot_bytes,
                                       slots + static_cast<uint64_t>(origin[i]) * slot_bytes, block_bytes) == 0;
  }
  context.report.that("blocks through the host tier",
                      text("%llu bytes a layer", static_cast<unsigned long long>(block_bytes / 3)), are_same);
  lib.ok(lib.host_arena_close(side.device, 1));
}

void check_waiting(Context& context) {
  Side side(context.cuda, default_config());
  const Library& lib = side.lib;
  uint32_t event = 0;
  lib.ok(lib.event_create(side.device, &event));
  context.report.that("event never recorded is done", "", lib.event_query(side.device, event) == KVS_OK);
  context.report.that("wait times out", "", lib.wait(side.device, 2000) == KVS_TIMEOUT);
  lib.ok(lib.post(side.device));
  context.report.that("a post before the wait counts", "", lib.wait(side.device, 0) == KVS_OK);
  context.report.that("and counts once", "", lib.wait(side.device, 0) == KVS_TIMEOUT);
  std::thread poster([&] { lib.post(side.device); });
  context.report.that("a post of another thread wakes", "", lib.wait(side.device, 10'000'000) == KVS_OK);
  poster.join();
  lib.ok(lib.record(side.device, KVS_STREAM_SAVE, event, 1));
  context.report.that("a watched event wakes", "",
                      lib.wait(side.device, 10'000'000) == KVS_OK && lib.event_query(side.device, event) == KVS_OK);
  lib.ok(lib.record(side.device, KVS_STREAM_LOAD, event, 0));
  while (lib.event_query(side.device, event) == KVS_PENDING) {
  }
  context.report.that("an unwatched one does not", "", lib.wait(side.device, 2000) == KVS_TIMEOUT);
}

/** A step through one small layer; with a graph the same as without. */
class Layer {
 public:
  Layer(Context& context, kvs_dtype dtype) : random_(context.random), side_(context.cuda, make_config(dtype)) {
    const Library& lib = side_.lib;
    std::vector<double> frequencies(32);
    for (size_t i = 0; i < 32; ++i) frequencies[i] = std::pow(10000.0, -static_cast<double>(i) / 32.0);
    lib.ok(lib.set_rope(side_.device, frequencies.data()));
    lib.ok(lib.kv_create(side_.device, 40));
    embedding_ = side_.random_weight(500, 256, dtype, 1, 1.0f);
    qkv_ = side_.random_weight(512, 256, dtype, 2, 0.06f);
    out_ = side_.random_weight(256, 256, dtype, 3, 0.06f);
    norm_ = side_.floats(std::vector<float>(256, 1.0f));
    hidden_ = side_.poisoned(32 * 256, KVS_F32);
    gathered_ = side_.poisoned(32 * 256, KVS_F32);
    normed_ = side_.poisoned(32 * 256);
    qkv_out_ = side_.poisoned(32 * 512);
    q_ = side_.poisoned(32 * 256);
    y_ = side_.poisoned(32 * 256);
    logits_ = side_.poisoned(32 * 500, KVS_F32);
  }

  void enqueue(uint32_t rows) {
    const Library& lib = side_.lib;
    kvs_device* d = side_.device;
    lib.ok(lib.embed(d, hidden_, embedding_, rows));
    lib.ok(lib.rms_norm(d, normed_, hidden_, norm_, rows, 256, 1e-5f));
    lib.ok(lib.matmul(d, qkv_out_, normed_, qkv_, 0, rows, 0));
    lib.ok(lib.append_kv(d, q_, qkv_out_, 0, 0, 0, rows, 1e-5f));
    lib.ok(lib.attention(d, y_, q_, 0, 0, rows));
    lib.ok(lib.matmul(d, hidden_, y_, out_, 0, rows, KVS_MATMUL_ACCUMULATE));
    lib.ok(lib.gather_logit_rows(d, gathered_, hidden_, rows, 256));
    lib.ok(lib.rms_norm(d, normed_, gathered_, norm_, rows, 256, 1e-5f));
    lib.ok(lib.matmul(d, logits_, normed_, embedding_, 0, rows, KVS_MATMUL_F32_OUT));
  }

  /** Logits of a step of `sequences` rows at `position`, padded to `rows`. mode: 0 direct, 1 capture, 2 launch. */
  std::vector<float> step(uint32_t sequences, uint32_t rows, int32_t position, int mode) {
    const Library& lib = side_.lib;
    Step step;
    for (uint32_t s = 0; s < sequences; ++s) {
      const int32_t id = static_cast<int32_t>((s * 37 + static_cast<uint32_t>(position) * 11) % 500);
      lib.ok(lib.write_tokens(side_.device, s, static_cast<uint32_t>(position), &id, 1));
      step.sequences.push_back({static_cast<int32_t>(s), position, 1, {}});
      for (int32_t j = 0; j <= position / 16; ++j)
        step.sequences.back().table.push_back(static_cast<int32_t>(s) * 4 + j);
    }
    step.padding = static_cast<int32_t>(rows - sequences);
    for (uint32_t row = 0; row < rows; ++row) {
      step.logit_rows.push_back(row < sequences ? static_cast<int32_t>(row) : 0);
      step.sampling.push_back(greedy(row < sequences ? static_cast<int32_t>(row) : -1));
    }
    const BegunStep begun(side_, step);
    if (mode == 2) {
      lib.ok(lib.graph_launch(side_.device, 7));
    } else {
      if (mode == 1) lib.ok(lib.graph_begin(side_.device, 7));
      enqueue(rows);
      if (mode == 1) lib.ok(lib.graph_end(side_.device, 7));
    }
    return side_.read(logits_, size_t{sequences} * 500, KVS_F32);
  }

 private:
  static kvs_device_config make_config(kvs_dtype dtype) {
    kvs_device_config config = default_config();
    config.hidden_size = 256;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 64;
    config.rotary_dim = 64;
    config.block_tokens = 16;
    config.vocab_size = 500;
    config.compute_dtype = dtype;
    config.kv_dtype = dtype;
    return config;
  }

  Random& random_;
  Side side_;
  kvs_weight* embedding_;
  kvs_weight* qkv_;
  kvs_weight* out_;
  uint64_t norm_, hidden_, gathered_, normed_, qkv_out_, q_, y_, logits_;
};

void check_graphs(Context& context, kvs_dtype dtype) {
  Layer direct(context, dtype);
  Layer graphed(context, dtype);
  for (int32_t position = 0; position < 40; ++position) {
    // Up to 8 sequences in a graph of 8 rows: some steps are padded.
    const uint32_t sequences = position < 20 ? 8 : 5;
    const std::vector<float> a = direct.step(sequences, 8, position, 0);
    const std::vector<float> b = graphed.step(sequences, 8, position, position == 0 ? 1 : 2);
    Limits limits = limits_of(dtype, 256);
    limits.ulps = 1e9;
    context.report.rows(text("graph, compute %s,", name_of(dtype)), text("position %d", position), KVS_F32, b, a, 500,
                        limits);
  }
}

}  // namespace

void check_streams(Context& context) {
  const auto guarded = [&](const char* what, const std::function<void()>& body) {
    try {
      body();
    } catch (const std::exception& error) {
      context.report.threw(what, "", error.what());
    }
  };
  guarded("blocks through the host tier", [&] { check_round_trip(context, 8, 1, false); });
  guarded("blocks through the host tier", [&] { check_round_trip(context, 64, context.is_small ? 2 : 16, false); });
  // More than a gibibyte of slots: host memory is page-locked in several pieces.
  if (!context.is_small) guarded("blocks through the host tier", [&] { check_round_trip(context, 256, 64, true); });
  guarded("waiting", [&] { check_waiting(context); });
  for (const kvs_dtype dtype : compute_dtypes) guarded("graph", [&] { check_graphs(context, dtype); });
}

}  // namespace check
