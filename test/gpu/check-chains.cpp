// Operations of few rows one behind the other, as the layers of a decode step have them: in the CUDA library kernels
// start before those ahead of them end, and a gate becomes part of the product before it. They are compared with the
// CPU library, with the same operations launched one by one, and with themselves, again and again: what does not wait
// for what it reads shows as bits that change.

#include "checks.h"

namespace check {

namespace {

enum class Kind { norm, product, gate };

/** y and x are buffers of the program, weight one of its matrices (products) or norms. */
struct Operation {
  Kind kind;
  uint32_t y;
  uint32_t x;
  uint32_t weight = 0;
  uint32_t flags = 0;
  bool has_bias = false;
};

struct Shape {
  uint32_t outputs;
  uint32_t inputs;
};

struct Program {
  const char* name;
  std::vector<uint32_t> buffers;  // values of a row
  uint32_t residual;              // the buffer that norms read and products are added to: F32
  std::vector<Shape> weights;
  std::vector<Operation> operations;
};

constexpr uint32_t added = KVS_MATMUL_ACCUMULATE;

/** Whether the buffer ends as what a gate was made of, which holds nothing of use. */
bool is_spent(const Program& program, uint32_t buffer) {
  bool is_spent = false;
  for (const Operation& o : program.operations) {
    if (o.y == buffer) is_spent = false;
    if (o.kind == Kind::gate && o.x == buffer) is_spent = true;
  }
  return is_spent;
}

/** From attention's output to the next layer's attention. */
Program layer(uint32_t hidden, uint32_t intermediate, uint32_t qkv) {
  return {"layer",
          {hidden, hidden, hidden, 2 * intermediate, intermediate, qkv},
          1,
          {{hidden, hidden}, {2 * intermediate, hidden}, {hidden, intermediate}, {qkv, hidden}},
          {{Kind::product, 1, 0, 0, added},
           {Kind::norm, 2, 1},
           {Kind::product, 3, 2, 1, 0, true},
           {Kind::gate, 4, 3},
           {Kind::product, 1, 4, 2, added, true},
           {Kind::norm, 2, 1},
           {Kind::product, 5, 2, 3, 0, true}}};
}

/** Rows that are overwritten while others may still read them, gates that belong to no product or come late. */
Program oddities(uint32_t hidden, uint32_t intermediate) {
  std::vector<Operation> operations = {
      {Kind::norm, 1, 0},                 // a norm
      {Kind::product, 0, 1, 0, added},    // whose product is added to the rows that it normed
      {Kind::norm, 1, 0},                 // over what may still be read
      {Kind::product, 2, 1, 1},           //
      {Kind::norm, 1, 0},                 // two norms, only the second multiplied
      {Kind::norm, 4, 0},                 //
      {Kind::product, 3, 4, 2, 0, true},  // a product whose gate comes late
      {Kind::product, 0, 4, 0, added},    //
      {Kind::gate, 2, 3},                 //
      {Kind::product, 0, 2, 3, added},    //
      {Kind::product, 3, 4, 2, 0, true},  // a gate behind another product
      {Kind::product, 1, 2, 3},           //
      {Kind::gate, 2, 3},                 //
      {Kind::product, 1, 2, 3},           //
  };
  for (uint32_t i = 0; i < 11; ++i) {
    const uint32_t y = i % 2 == 0 ? 1 : 4;
    operations.push_back({Kind::product, y, 5 - y, 0});
    if (i % 3 == 0) operations.push_back({Kind::product, 0, y, 0, added});
  }
  operations.push_back({Kind::product, 3, 4, 2});  // waits at the end
  return {"oddities",
          {hidden, hidden, intermediate, 2 * intermediate, hidden},
          0,
          {{hidden, hidden}, {intermediate, hidden}, {2 * intermediate, hidden}, {hidden, intermediate}},
          operations};
}

using Values = std::vector<std::vector<float>>;  // of the buffers

/** A program with its inputs, runnable on a side. */
class Run {
 public:
  Run(Context& context, const Program& program, uint32_t rows, kvs_dtype dtype) : program_(program), rows_(rows) {
    for (const uint32_t size : program.buffers) {
      before_.push_back(rounded(normal(context.random, size_t{rows} * size), dtype));
    }
    for (const Shape& shape : program.weights) {
      const float deviation = 1.0f / std::sqrt(static_cast<float>(shape.inputs));
      weights_.push_back(rounded(normal(context.random, size_t{shape.outputs} * shape.inputs, deviation), dtype));
      biases_.push_back(rounded(normal(context.random, shape.outputs, 0.5f), dtype));
    }
    const uint32_t longest = *std::max_element(program.buffers.begin(), program.buffers.end());
    for (const float value : normal(context.random, longest)) norm_.push_back(1.0f + 0.2f * value);
  }

  /** `repeats` runs, each from the same inputs, enqueued one behind the other; the buffers after each, none of those
   * that are spent. */
  std::vector<Values> on(Side& side, kvs_dtype weight_dtype, bool is_one_by_one, uint32_t repeats) const {
    std::vector<kvs_weight*> weights;
    std::vector<uint64_t> biases, buffers;
    for (size_t w = 0; w < weights_.size(); ++w) {
      const Shape& shape = program_.weights[w];
      weights.push_back(side.weight(shape.outputs, shape.inputs, weight_dtype, weights_[w]));
      biases.push_back(side.floats(biases_[w]));
    }
    const uint64_t norm = side.floats(norm_);
    std::vector<Values> results;
    std::vector<std::vector<uint64_t>> of_runs;
    for (uint32_t i = 0; i < repeats; ++i) {
      std::vector<uint64_t> placed;
      for (size_t b = 0; b < before_.size(); ++b) placed.push_back(side.place(before_[b], dtype_of(side, b)));
      of_runs.push_back(placed);
    }
    for (const std::vector<uint64_t>& placed : of_runs) {
      for (const Operation& operation : program_.operations) {
        enqueue(side, operation, placed, weights, biases, norm);
        if (is_one_by_one) side.wait();
      }
    }
    for (const std::vector<uint64_t>& placed : of_runs) {
      Values values;
      for (size_t b = 0; b < placed.size(); ++b) {
        const size_t count = is_spent(program_, b) ? 0 : size_t{rows_} * program_.buffers[b];
        values.push_back(count == 0 ? std::vector<float>() : side.read(placed[b], count, dtype_of(side, b)));
      }
      results.push_back(std::move(values));
    }
    side.reset();
    return results;
  }

 private:
  kvs_dtype dtype_of(const Side& side, size_t buffer) const {
    return buffer == program_.residual ? kvs_dtype{KVS_F32} : side.config.compute_dtype;
  }

  void enqueue(Side& side, const Operation& o, const std::vector<uint64_t>& buffers,
               const std::vector<kvs_weight*>& weights, const std::vector<uint64_t>& biases, uint64_t norm) const {
    const Library& lib = side.lib;
    const uint64_t y = buffers[o.y];
    const uint64_t x = buffers[o.x];
    switch (o.kind) {
      case Kind::norm:
        return lib.ok(lib.rms_norm(side.device, y, x, norm, rows_, program_.buffers[o.x], 1e-5f));
      case Kind::gate:
        return lib.ok(lib.silu_mul(side.device, y, x, rows_, program_.buffers[o.y]));
      case Kind::product:
        return lib.ok(
            lib.matmul(side.device, y, x, weights[o.weight], o.has_bias ? biases[o.weight] : 0, rows_, o.flags));
    }
  }

  const Program& program_;
  uint32_t rows_;
  Values before_, weights_, biases_;
  std::vector<float> norm_;
};

/** Whether FP8 products of few rows are left to the library, which quantises x: not all of ours take such inputs. */
bool has_odd_inputs(const Program& program) {
  const auto is_odd = [](const Shape& shape) { return shape.inputs % 128 != 0; };
  return std::any_of(program.weights.begin(), program.weights.end(), is_odd);
}

/** Roundings add up along a program: so many times those of one operation. */
Limits along(const Limits& one, double count) { return {one.row_error * count, one.ulps * count}; }

void check_program(Context& context, Side& cuda, Side& cpu, const Program& program, uint32_t rows,
                   kvs_dtype weight_dtype) {
  const kvs_dtype dtype = cuda.config.compute_dtype;
  const bool is_fp8 = weight_dtype == KVS_F8E4M3;
  const std::string of_case = text("%s %u rows, hidden %u", program.name, rows, program.buffers[0]);
  const std::string chain = is_fp8 ? "chain, fp8 weights" : "chain";
  const Run run(context, program, rows, dtype);
  const uint32_t repeats = context.is_small ? 2 : 12;
  const std::vector<Values> chained = run.on(cuda, weight_dtype, false, repeats);
  const Values one_by_one = run.on(cuda, weight_dtype, true, 1)[0];
  bool is_steady = true;
  for (const Values& values : chained) is_steady = is_steady && values == chained[0];
  context.report.that(chain + ": bits of every run", of_case, is_steady);
  // Prompts have no gates inside FP8 products: launched together or one by one, they are the same kernels.
  if (is_fp8 && rows > 64) context.report.that(chain + ": bits of one by one", of_case, chained[0] == one_by_one);
  const Values reference = is_fp8 ? Values{} : run.on(cpu, KVS_F32, false, 1)[0];
  for (size_t b = 0; b < program.buffers.size(); ++b) {
    if (is_spent(program, b)) continue;
    const std::string of_buffer = text("%s, buffer %zu", of_case.c_str(), b);
    const Limits one = limits_of(dtype, program.buffers[b]);
    // Where x is quantised, what a gate's rounding moves over the border of two FP8 values moves by a sixteenth.
    const Limits limits = is_fp8 && has_odd_inputs(program) ? Limits{0.04, 1e3} : along(one, 2);
    context.report.rows(chain + ", one by one", of_buffer, dtype, chained[0][b], one_by_one[b], program.buffers[b],
                        limits);
    if (is_fp8) continue;
    context.report.rows(chain, of_buffer, dtype, chained[0][b], reference[b], program.buffers[b], along(one, 4));
  }
}

}  // namespace

void check_chains(Context& context) {
  const std::vector<uint32_t> row_counts =
      context.is_small ? std::vector<uint32_t>{1, 16, 40}
                       : std::vector<uint32_t>{1, 2, 3, 5, 8, 9, 13, 16, 17, 33, 64};
  for (const kvs_dtype dtype : {KVS_BF16, KVS_F16}) {
    kvs_device_config config = default_config();
    config.compute_dtype = dtype;
    config.max_rows = 512;
    Side cuda(context.cuda, config);
    Side cpu(context.cpu, for_cpu(config));
    for (const uint32_t rows : row_counts) {
      std::vector<Program> programs = {layer(512, 768, 1024), oddities(512, 768)};
      if (!context.is_small) {
        programs.push_back(layer(256, 512, 320));
        programs.push_back(layer(256, 368, 320));  // a gate that ends within a tile
        if (rows == 1 || rows == 8 || rows == 16) programs.push_back(layer(2048, 5632, 2560));
      }
      for (const Program& program : programs) {
        check_program(context, cuda, cpu, program, rows, dtype);
        check_program(context, cuda, cpu, program, rows, KVS_F8E4M3);
      }
    }
    if (context.is_small) continue;
    // Prompts: the gate is part of a kernel for both, where tiles keep the GPU busy, or comes behind the library's.
    for (const uint32_t rows : {300u, 500u, 512u}) {
      check_program(context, cuda, cpu, layer(512, 8448, 320), rows, dtype);
      check_program(context, cuda, cpu, layer(512, 8448, 320), rows, KVS_F8E4M3);
      check_program(context, cuda, cpu, layer(320, 368, 320), rows, KVS_F8E4M3);
      check_program(context, cuda, cpu, oddities(512, 768), rows, KVS_F8E4M3);
    }
    check_program(context, cuda, cpu, layer(5120, 14336, 320), 100, KVS_F8E4M3);
    // At the sizes of a large model, where thread blocks share outputs.
    for (const uint32_t rows : {1u, 8u, 16u, 64u}) {
      const Program program = layer(4096, 14336, 6144);
      check_program(context, cuda, cpu, program, rows, KVS_F8E4M3);
      if (dtype == KVS_BF16 && rows != 16) check_program(context, cuda, cpu, program, rows, dtype);
    }
  }
}

}  // namespace check
