// Wrong arguments: both libraries must answer the same status, and go on working.

#include <functional>

#include "checks.h"
#include "step-builder.h"

namespace check {

namespace {

struct Prepared {
  explicit Prepared(Side& side) : side(side) {
    y = side.poisoned(64 * 64);
    x = side.activations(std::vector<float>(64 * 64, 1.0f));
    weight = side.weight(32, 64, side.config.compute_dtype, std::vector<float>(32 * 64, 0.5f));
  }
  Side& side;
  uint64_t y, x;
  kvs_weight* weight;
};

struct Refusal {
  const char* name;
  std::function<kvs_status(const Library&, kvs_device*, const Prepared&)> call;
};

const std::vector<Refusal>& refusals() {
  static const std::vector<Refusal> all = {
      {"norm past the allocation",
       [](auto& lib, auto* d, auto& p) { return lib.rms_norm(d, p.y, p.x, p.x, 64, 4096, 1e-5f); }},
      {"norm of no rows", [](auto& lib, auto* d, auto& p) { return lib.rms_norm(d, p.y, p.x, p.x, 0, 64, 1e-5f); }},
      {"norm of too many rows",
       [](auto& lib, auto* d, auto& p) { return lib.rms_norm(d, p.y, p.x, p.x, 65, 8, 1e-5f); }},
      {"a host address",
       [](auto& lib, auto* d, auto& p) { return lib.gelu(d, reinterpret_cast<uint64_t>(&p), p.x, 1, 8); }},
      {"unaligned address", [](auto& lib, auto* d, auto& p) { return lib.gelu(d, p.y + 2, p.x, 1, 8); }},
      {"matmul with unknown flags",
       [](auto& lib, auto* d, auto& p) { return lib.matmul(d, p.y, p.x, p.weight, 0, 1, 4); }},
      {"a weight that is none",
       [](auto& lib, auto* d, auto& p) {
         return lib.matmul(d, p.y, p.x, reinterpret_cast<kvs_weight*>(p.x), 0, 1, 0);
       }},
      {"embed without a step", [](auto& lib, auto* d, auto& p) { return lib.embed(d, p.y, p.weight, 1); }},
      {"attention without blocks", [](auto& lib, auto* d, auto& p) { return lib.attention(d, p.y, p.x, 0, 0, 1); }},
      {"rows past the matrix",
       [](auto& lib, auto* d, auto& p) { return lib.weight_upload(d, p.weight, 30, 3, &p, KVS_F32); }},
      {"no such event", [](auto& lib, auto* d, auto&) { return lib.record(d, KVS_STREAM_COMPUTE, 99, 1); }},
      {"no such stream", [](auto& lib, auto* d, auto&) { return lib.record(d, 3, 0, 1); }},
      {"tokens past the slot",
       [](auto& lib, auto* d, auto&) {
         const int32_t ids[2] = {1, 2};
         return lib.write_tokens(d, 0, 64, ids, 2);
       }},
      {"token id past the vocabulary",
       [](auto& lib, auto* d, auto&) {
         const int32_t id = 1000;
         return lib.write_tokens(d, 0, 0, &id, 1);
       }},
      {"token slot past the last",
       [](auto& lib, auto* d, auto&) {
         const int32_t id = 1;
         return lib.write_tokens(d, 8, 0, &id, 1);
       }},
      {"a step in ordinary memory",
       [](auto& lib, auto* d, auto&) {
         const int32_t step[16] = {1};
         return lib.begin_step(d, step, sizeof step);
       }},
      {"copy_out to ordinary memory",
       [](auto& lib, auto* d, auto& p) { return lib.copy_out(d, reinterpret_cast<uint64_t>(&p), p.x, 64); }},
      {"load without an arena",
       [](auto& lib, auto* d, auto& p) {
         const int32_t zero = 0;
         lib.kv_create(d, 2);
         return lib.load_layer(d, 0, &zero, &zero, 1, p.side.event);
       }},
      {"copy of a block that is not there",
       [](auto& lib, auto* d, auto&) {
         const int32_t a = 0, b = 5;
         return lib.copy_blocks(d, &a, &b, 1);
       }},
      {"free of an address inside", [](auto& lib, auto* d, auto& p) { return lib.free(d, p.x + 256); }},
      {"null device", [](auto& lib, auto*, auto& p) { return lib.gelu(nullptr, p.y, p.x, 1, 8); }},
  };
  return all;
}

}  // namespace

void check_refusals(Context& context) {
  const kvs_device_config config = default_config();
  Side cuda(context.cuda, config);
  Side cpu(context.cpu, config);
  const Prepared on_cuda(cuda);
  const Prepared on_cpu(cpu);
  for (const Refusal& refusal : refusals()) {
    const kvs_status a = refusal.call(cuda.lib, cuda.device, on_cuda);
    const kvs_status b = refusal.call(cpu.lib, cpu.device, on_cpu);
    context.report.that("refused alike", text("%s: %d, cpu %d (%s)", refusal.name, a, b, cuda.lib.last_error()),
                        a == b && a < 0);
  }
  cuda.lib.ok(cuda.lib.gelu(cuda.device, on_cuda.y, on_cuda.x, 1, 8));
  context.report.that("works after refusals", "", std::isfinite(cuda.read(on_cuda.y, 8)[7]));
}

}  // namespace check
