// Matrix products over rows, sizes and flags; FP8 against the exact product of what was quantised.

#include "checks.h"

namespace check {

namespace {

struct Shape {
  uint32_t outputs;
  uint32_t inputs;
};

struct Case {
  uint32_t rows;
  Shape shape;
  uint32_t flags;
  bool has_bias;
};

std::vector<float> run(Side& side, const Case& c, const std::vector<float>& x, const std::vector<float>& w,
                       const std::vector<float>& bias, const std::vector<float>& before, kvs_dtype weight_dtype) {
  const size_t count = size_t{c.rows} * c.shape.outputs;
  const kvs_dtype y_dtype = (c.flags & KVS_MATMUL_F32_OUT) != 0 ? kvs_dtype{KVS_F32} : side.config.compute_dtype;
  kvs_weight* weight = side.weight(c.shape.outputs, c.shape.inputs, weight_dtype, w);
  const uint64_t y =
      (c.flags & KVS_MATMUL_ACCUMULATE) != 0 ? side.place(before, y_dtype) : side.poisoned(count, y_dtype);
  const uint64_t b = c.has_bias ? side.floats(bias) : 0;
  side.lib.ok(side.lib.matmul(side.device, y, side.activations(x), weight, b, c.rows, c.flags));
  std::vector<float> out = side.read(y, count, y_dtype);
  side.reset();
  return out;
}

void check_case(Context& context, Side& cuda, Side& cpu, const Case& c) {
  const kvs_dtype dtype = cuda.config.compute_dtype;
  const kvs_dtype y_dtype = (c.flags & KVS_MATMUL_F32_OUT) != 0 ? kvs_dtype{KVS_F32} : dtype;
  const std::vector<float> x = rounded(normal(context.random, size_t{c.rows} * c.shape.inputs), dtype);
  const std::vector<float> w =
      rounded(normal(context.random, size_t{c.shape.outputs} * c.shape.inputs, 0.05f), dtype);
  const std::vector<float> bias = normal(context.random, c.shape.outputs);
  const std::vector<float> before = rounded(normal(context.random, size_t{c.rows} * c.shape.outputs), y_dtype);
  const std::string of_case =
      text("(%u, %u) x (%u)%s%s", c.shape.outputs, c.shape.inputs, c.rows,
           (c.flags & KVS_MATMUL_ACCUMULATE) != 0 ? " accumulate" : "", c.has_bias ? " bias" : "");
  try {
    // Of F32 outputs of 16-bit inputs only the order of the sum differs.
    context.report.rows((c.flags & KVS_MATMUL_F32_OUT) != 0 ? text("matmul %s to", name_of(dtype)) : "matmul",
                        of_case, y_dtype, run(cuda, c, x, w, bias, before, dtype),
                        run(cpu, c, x, w, bias, before, dtype), c.shape.outputs, limits_of(y_dtype, c.shape.inputs));
  } catch (const std::exception& error) {
    context.report.threw("matmul", of_case, error.what());
  }
}

/** FP8 rounds x and w to three bits: relative to the unquantised product the row error is a few per cent. */
void check_fp8(Context& context, Side& cuda, Side& cpu, const Case& c) {
  const kvs_dtype dtype = cuda.config.compute_dtype;
  const std::vector<float> x = rounded(normal(context.random, size_t{c.rows} * c.shape.inputs), dtype);
  const std::vector<float> w =
      rounded(normal(context.random, size_t{c.shape.outputs} * c.shape.inputs, 0.05f), dtype);
  const std::vector<float> bias = normal(context.random, c.shape.outputs, 0.1f);
  const std::vector<float> before = rounded(normal(context.random, size_t{c.rows} * c.shape.outputs), dtype);
  const std::string of_case = text("(%u, %u) x (%u)", c.shape.outputs, c.shape.inputs, c.rows);
  try {
    const std::vector<float> y = run(cuda, c, x, w, bias, before, KVS_F8E4M3);
    context.report.rows("matmul fp8 weights", of_case, dtype, y, run(cpu, c, x, w, bias, before, dtype),
                        c.shape.outputs, {0.06, 1e9});
  } catch (const std::exception& error) {
    context.report.threw("matmul fp8 weights", of_case, error.what());
  }
}

}  // namespace

void check_matmul(Context& context) {
  const std::vector<Shape> shapes =
      context.is_small ? std::vector<Shape>{{48, 40}, {288, 288}, {1024, 768}}
                       : std::vector<Shape>{{16, 16},   {48, 40},     {100, 72},    {288, 288},  {768, 288},
                                            {1001, 96}, {4096, 1024}, {1024, 4096}, {6144, 4096}};
  const std::vector<uint32_t> row_counts = context.is_small
                                               ? std::vector<uint32_t>{1, 5, 17}
                                               : std::vector<uint32_t>{1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 130};
  for (const kvs_dtype dtype : compute_dtypes) {
    kvs_device_config config = default_config();
    config.compute_dtype = dtype;
    config.max_rows = 256;
    Side cuda(context.cuda, config);
    Side cpu(context.cpu, for_cpu(config));
    for (const Shape& shape : shapes) {
      for (const uint32_t rows : row_counts) {
        const uint32_t draw = static_cast<uint32_t>(context.random());
        check_case(context, cuda, cpu, {rows, shape, 0, false});
        check_case(context, cuda, cpu, {rows, shape, KVS_MATMUL_ACCUMULATE, (draw & 1) != 0});
        check_case(context, cuda, cpu, {rows, shape, KVS_MATMUL_F32_OUT, (draw & 2) != 0});
        check_case(context, cuda, cpu, {rows, shape, 0, true});
        if (dtype == KVS_F32 || shape.outputs % 16 != 0 || shape.inputs % 16 != 0) continue;
        check_fp8(context, cuda, cpu,
                  {rows, shape, (draw & 4) != 0 ? uint32_t{KVS_MATMUL_ACCUMULATE} : 0u, (draw & 8) != 0});
      }
    }
    if (context.is_small) continue;
    check_case(context, cuda, cpu, {1, {28672, 4096}, 0, false});
    check_case(context, cuda, cpu, {16, {4096, 14336}, KVS_MATMUL_ACCUMULATE, false});
    check_case(context, cuda, cpu, {64, {5120, 13824}, KVS_MATMUL_ACCUMULATE, false});
    check_case(context, cuda, cpu, {4, {128256, 2048}, KVS_MATMUL_F32_OUT, false});
  }
}

}  // namespace check
