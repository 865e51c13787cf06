// Matrix products over rows, sizes and flags; FP8 against the exact product of what was quantised. Scales of FP8
// products come in where the GPU has it best, or with KVASIR_CUDA_FP8_SCALES=after in the environment after them.

#include <cstdlib>
#include <cstring>

#include "checks.h"

namespace check {

namespace {

struct Shape {
  uint32_t outputs;
  uint32_t inputs;
};

struct Case {
  uint32_t rows;
  uint32_t flags;
  bool has_bias;
};

/** After products rather than inside them. */
bool has_fp8_scales_after(const Side& cuda) {
  char info[4096] = "";
  cuda.lib.ok(cuda.lib.device_info(cuda.device, info, sizeof info));
  return std::strstr(info, "\"fp8_scales\":\"after\"") != nullptr;
}

/** One matrix on both devices, multiplied in many ways. */
class Matrix {
 public:
  Matrix(Context& context, Side& cuda, Side& cpu, const Shape& shape) : context_(context), shape_(shape) {
    dtype_ = cuda.config.compute_dtype;
    const size_t count = size_t{shape.outputs} * shape.inputs;
    std::vector<float> w = rounded(normal(context.random, count, 0.05f), dtype_);
    // An output that training let decay to nothing must not become NaN.
    for (uint32_t i = 0; i < shape.inputs; ++i) w[i] = i % 2 == 0 || dtype_ == KVS_F16 ? 0.0f : 0x1p-123f;
    sides_[0] = {&cuda, cuda.weight(shape.outputs, shape.inputs, dtype_, w)};
    sides_[1] = {&cpu, cpu.weight(shape.outputs, shape.inputs, dtype_, w)};
    if (dtype_ != KVS_F32 && shape.outputs % 32 == 0 && shape.inputs % 32 == 0) {
      fp8_ = {&cuda, cuda.weight(shape.outputs, shape.inputs, KVS_F8E4M3, w)};
      is_scaled_after_ = has_fp8_scales_after(cuda);
    }
  }
  ~Matrix() {
    for (const Placed& placed : sides_) placed.side->reset();
  }

  void check(const Case& c) {
    const kvs_dtype y_dtype = y_dtype_of(c, dtype_);
    draw(c, y_dtype);
    const std::string of_case =
        text("(%u, %u) x (%u)%s%s", shape_.outputs, shape_.inputs, c.rows,
             (c.flags & KVS_MATMUL_ACCUMULATE) != 0 ? " accumulate" : "", c.has_bias ? " bias" : "");
    const bool is_f32_out = y_dtype == KVS_F32;
    // Of F32 outputs of 16-bit inputs only the order of the sum differs.
    const std::string what = is_f32_out ? text("matmul %s to", name_of(dtype_)) : "matmul";
    try {
      const std::vector<float> reference = run(sides_[1], c);
      context_.report.rows(what, of_case, y_dtype, run(sides_[0], c), reference, shape_.outputs,
                           limits_of(y_dtype, shape_.inputs));
      // Three bits of mantissa in w, and in x where it is rounded too: 5 % of a row, 6 % of the worst ones.
      if (fp8_.weight != nullptr) {
        const char* name = is_scaled_after_ ? "matmul, fp8, scales after," : "matmul, fp8 weights,";
        context_.report.rows(name, of_case, y_dtype, run(fp8_, c), reference, shape_.outputs, {0.07, 1e9});
      }
    } catch (const std::exception& error) {
      context_.report.threw(what, of_case, error.what());
    }
  }

 private:
  struct Placed {
    Side* side = nullptr;
    kvs_weight* weight = nullptr;
  };

  static kvs_dtype y_dtype_of(const Case& c, kvs_dtype compute) {
    return c.flags != 0 ? kvs_dtype{KVS_F32} : compute;
  }

  void draw(const Case& c, kvs_dtype y_dtype) {
    x_ = rounded(normal(context_.random, size_t{c.rows} * shape_.inputs), dtype_);
    // As a checkpoint of this type has it: the library takes a bias in the type of the output, and rounding another one
    // would count as a second rounding of the output.
    bias_ = rounded(normal(context_.random, shape_.outputs), dtype_);
    before_ = rounded(normal(context_.random, size_t{c.rows} * shape_.outputs), y_dtype);
  }

  std::vector<float> run(const Placed& placed, const Case& c) const {
    Side& side = *placed.side;
    const size_t count = size_t{c.rows} * shape_.outputs;
    const kvs_dtype y_dtype = y_dtype_of(c, side.config.compute_dtype);
    const uint64_t y =
        (c.flags & KVS_MATMUL_ACCUMULATE) != 0 ? side.place(before_, y_dtype) : side.poisoned(count, y_dtype);
    const uint64_t b = c.has_bias ? side.floats(bias_) : 0;
    side.lib.ok(side.lib.matmul(side.device, y, side.activations(x_), placed.weight, b, c.rows, c.flags));
    std::vector<float> out = side.read(y, count, y_dtype);
    side.free_memory();
    return out;
  }

  Context& context_;
  const Shape shape_;
  kvs_dtype dtype_;
  Placed sides_[2];
  Placed fp8_;
  bool is_scaled_after_ = false;
  std::vector<float> x_, bias_, before_;
};

}  // namespace

void check_matmul(Context& context) {
  const std::vector<Shape> shapes =
      context.is_small ? std::vector<Shape>{{48, 40}, {96, 192}, {288, 288}, {1024, 768}}
                       : std::vector<Shape>{{16, 16},   {48, 40},  {40, 192},    {64, 384},    {100, 72},   {288, 288},
                                            {768, 288}, {1001, 96}, {4096, 1024}, {1024, 4096}, {6144, 4096}};
  const std::vector<uint32_t> row_counts =
      context.is_small ? std::vector<uint32_t>{1, 5, 16, 17, 50}
                       : std::vector<uint32_t>{1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 48, 64, 65, 130};
  for (const kvs_dtype dtype : compute_dtypes) {
    kvs_device_config config = default_config();
    config.compute_dtype = dtype;
    config.max_rows = 256;
    Side cuda(context.cuda, config);
    Side cpu(context.cpu, for_cpu(config));
    for (const Shape& shape : shapes) {
      Matrix matrix(context, cuda, cpu, shape);
      for (const uint32_t rows : row_counts) {
        const uint64_t draw = context.random();
        matrix.check({rows, 0, false});
        matrix.check({rows, KVS_MATMUL_ACCUMULATE, (draw & 1) != 0});
        matrix.check({rows, KVS_MATMUL_F32_OUT, (draw & 2) != 0});
        matrix.check({rows, 0, true});
      }
    }
    const char* wanted = std::getenv("KVASIR_CUDA_FP8_SCALES");
    if (dtype != KVS_F32 && wanted != nullptr && std::strcmp(wanted, "after") == 0) {
      context.report.that("fp8 scales as the environment says", wanted, has_fp8_scales_after(cuda));
    }
    if (context.is_small) continue;
    Matrix(context, cuda, cpu, {28672, 4096}).check({1, 0, false});
    Matrix(context, cuda, cpu, {4096, 14336}).check({16, KVS_MATMUL_ACCUMULATE, false});
    Matrix(context, cuda, cpu, {5120, 13824}).check({64, KVS_MATMUL_ACCUMULATE, false});
    Matrix(context, cuda, cpu, {128256, 2048}).check({4, KVS_MATMUL_F32_OUT, false});
  }
}

}  // namespace check
