// Checks the products of few rows against double arithmetic over odd shapes, then times them against the bytes of their
// weights, each alone and the chain of a layer. Builds alone with nvcc: see run.sh. Arguments: seed, then check,
// check-small (few, for the sanitizer), time or layers (default check and time).

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "../../sidecar/native/cuda/fp8-order.h"
#include "../../sidecar/native/cuda/skinny-matmul.h"
#include "../../sidecar/native/cuda/stream-k.h"
#include "gpu-bench.cuh"

namespace {

using bench::Device;
using bench::half_value;

/** Two families of kernels: rings of cp.async in each warp, for all GPUs, and stream-K on Hopper. */
enum class Kernel { rings, stream_k };
constexpr Kernel kernels[] = {Kernel::rings, Kernel::stream_k};
int checked[2] = {};  // cases of each

const char* name_of(Kernel kernel) { return kernel == Kernel::rings ? "rings   " : "stream-K"; }
bool supports(Kernel kernel, const kvs::SkinnyProduct& product, const kvs::SkinnyDevice& device) {
  return kernel == Kernel::rings ? kvs::skinny_supports(product, device) : kvs::stream_k_supports(product, device);
}
void multiply(Kernel kernel, const kvs::SkinnyProduct& product, const kvs::SkinnyDevice& device, cudaStream_t stream) {
  if (kernel == Kernel::rings) {
    BENCH_CHECK(kvs::skinny_matmul(product, device, stream));
  } else {
    BENCH_CHECK(kvs::stream_k_matmul(product, device, stream));
  }
}

struct Shape {
  uint32_t rows;
  uint32_t outputs;
  uint32_t inputs;
  kvs_dtype x_dtype = KVS_BF16;
  kvs_dtype weight_dtype = KVS_BF16;
  kvs_dtype y_dtype = KVS_BF16;
  bool has_bias = false;
  bool is_accumulating = false;
};

uint64_t row_bytes_of(const Shape& shape) {
  return shape.weight_dtype == KVS_F8E4M3 ? kvs::fp8_row_bytes(shape.inputs) : uint64_t{shape.inputs} * 2;
}

__host__ __device__ float e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const float magnitude = exponent == 0 ? (bits & 7) * 0.001953125f : (1 + (bits & 7) / 8.0f) * exp2f(exponent - 7.0f);
  return bits & 0x80 ? -magnitude : magnitude;
}

/** Random bytes, no NaN. Those that fill rows up are not zero here: x has none for them. */
__global__ void fill_e4m3(uint8_t* to, uint64_t count, uint64_t seed) {
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint8_t byte = static_cast<uint8_t>(bench::mix(seed * 77777777777ull + i));
    to[i] = (byte & 0x7f) == 0x7f ? 0x33 : byte;
  }
}

__device__ double half_value_at(const void* from, kvs_dtype dtype, uint64_t at) {
  if (dtype == KVS_F16) return __half2float(static_cast<const __half*>(from)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
}

__device__ double weight_value(const kvs::SkinnyProduct& a, uint64_t output, uint32_t k) {
  if (a.weight_dtype != KVS_F8E4M3) return half_value_at(a.weight, a.weight_dtype, output * a.inputs + k);
  const uint8_t* bytes = static_cast<const uint8_t*>(a.weight);
  return e4m3_value(bytes[output * kvs::fp8_row_bytes(a.inputs) + kvs::fp8_place(k)]);
}

__global__ void reference_product(double* y, const kvs::SkinnyProduct a) {
  const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<uint64_t>(a.rows) * a.outputs) return;
  const uint64_t output = i % a.outputs;
  const uint64_t row = i / a.outputs;
  double sum = 0;
  for (uint32_t k = 0; k < a.inputs; ++k) {
    sum += half_value_at(a.x, a.x_dtype, row * a.inputs + k) * weight_value(a, output, k);
  }
  if (a.weight_dtype == KVS_F8E4M3) sum *= a.scales[output];
  y[i] = sum + (a.bias == nullptr ? 0 : a.bias[output]);
}

/** One product with `copies` weights, so that the cache does not serve them. */
class Problem {
 public:
  /** arena: memory for the weights, or null. All shapes are timed in the same memory: where it lies can cost 15 %. */
  Problem(const Shape& shape, uint64_t seed, int copies = 1, char* arena = nullptr)
      : shape_(shape),
        weight_bytes_(shape.outputs * row_bytes_of(shape)),
        x_(static_cast<uint64_t>(shape.rows) * shape.inputs),
        own_weight_(arena == nullptr ? weight_bytes_ * copies : 0),
        weight_(arena == nullptr ? own_weight_.get() : arena),
        scales_(shape.outputs),
        bias_(shape.outputs),
        y_(static_cast<uint64_t>(shape.rows) * shape.outputs * 4),
        workspace_(kvs::skinny_workspace_bytes()),
        stream_k_workspace_(kvs::stream_k_workspace_bytes(properties().multiProcessorCount, capability())) {
    fill(x_.get(), x_.count(), shape.x_dtype, seed, 1.0f);
    if (shape.weight_dtype == KVS_F8E4M3) {
      fill_e4m3<<<4096, 256>>>(reinterpret_cast<uint8_t*>(weight_), weight_bytes_ * copies, seed + 1);
    } else {
      fill(reinterpret_cast<uint16_t*>(weight_), weight_bytes_ / 2 * copies, shape.weight_dtype, seed + 1, 0.02f);
    }
    bench::randomize(scales_.get(), shape.outputs, seed + 2, 0.01f);
    bench::randomize(bias_.get(), shape.outputs, seed + 3);
    workspace_.fill_bytes(0);
    stream_k_workspace_.fill_bytes(0);
  }

  kvs::SkinnyProduct product(int copy = 0) const {
    kvs::SkinnyProduct a = {};
    a.y = y_.get();
    a.x = x_.get();
    a.weight = weight_ + weight_bytes_ * copy;
    a.scales = scales_.get();
    a.bias = shape_.has_bias ? bias_.get() : nullptr;
    a.y_dtype = shape_.y_dtype;
    a.x_dtype = shape_.x_dtype;
    a.weight_dtype = shape_.weight_dtype;
    a.rows = shape_.rows;
    a.outputs = shape_.outputs;
    a.inputs = shape_.inputs;
    a.is_accumulating = shape_.is_accumulating;
    return a;
  }
  kvs::SkinnyDevice device() const {
    const cudaDeviceProp gpu = properties();
    return {workspace_.get(), stream_k_workspace_.get(), gpu.multiProcessorCount, capability()};
  }
  Device<char>& y() { return y_; }
  /** What thread blocks left one another has been taken, and zeros put in its place. */
  bool has_clean_workspace() const {
    const std::vector<char> left = stream_k_workspace_.host();
    return std::all_of(left.begin(), left.end(), [](char byte) { return byte == 0; });
  }

  double y_value(const std::vector<char>& y, uint64_t i) const {
    if (shape_.y_dtype == KVS_F32) return reinterpret_cast<const float*>(y.data())[i];
    return half_value(reinterpret_cast<const uint16_t*>(y.data())[i], shape_.y_dtype);
  }
  /** y before the product: random when it is added to, else NaN. */
  void prepare_y() {
    y_.fill_bytes(0xff);
    if (shape_.is_accumulating) bench::randomize(reinterpret_cast<float*>(y_.get()), y_.count() / 4, 99);
  }

 private:
  static cudaDeviceProp properties() {
    cudaDeviceProp properties;
    BENCH_CHECK(cudaGetDeviceProperties(&properties, 0));
    return properties;
  }
  static int capability() {
    const cudaDeviceProp gpu = properties();
    return gpu.major * 10 + gpu.minor;
  }
  static void fill(uint16_t* to, uint64_t count, kvs_dtype dtype, uint64_t seed, float deviation) {
    if (dtype == KVS_F16) {
      bench::randomize(reinterpret_cast<__half*>(to), count, seed, deviation);
    } else {
      bench::randomize(reinterpret_cast<__nv_bfloat16*>(to), count, seed, deviation);
    }
  }

  Shape shape_;
  uint64_t weight_bytes_;
  Device<uint16_t> x_;
  Device<char> own_weight_;
  char* weight_;
  Device<float> scales_;
  Device<float> bias_;
  Device<char> y_;
  Device<char> workspace_;
  Device<char> stream_k_workspace_;
};

void check_kernel(Kernel kernel, const Shape& shape, uint64_t seed) {
  Problem problem(shape, seed);
  const kvs::SkinnyProduct a = problem.product();
  const kvs::SkinnyDevice device = problem.device();
  if (!supports(kernel, a, device)) return;
  const uint64_t count = static_cast<uint64_t>(shape.rows) * shape.outputs;
  Device<double> expected(count);
  reference_product<<<static_cast<uint32_t>((count + 127) / 128), 128>>>(expected.get(), a);
  problem.prepare_y();
  const std::vector<char> before = problem.y().host();
  multiply(kernel, a, device, nullptr);
  BENCH_CHECK(cudaDeviceSynchronize());
  const std::vector<char> got = problem.y().host();
  problem.prepare_y();
  multiply(kernel, a, device, nullptr);
  BENCH_CHECK(cudaDeviceSynchronize());
  bench::expect(got == problem.y().host(), "a second run gives other bits");
  bench::expect(problem.has_clean_workspace(), "sums are left behind for the next product");
  ++checked[static_cast<int>(kernel)];
  const std::vector<double> want = expected.host();
  double worst = 0;
  for (uint32_t row = 0; row < shape.rows; ++row) {
    double error = 0, norm = 0;
    for (uint64_t i = static_cast<uint64_t>(row) * shape.outputs; i < (row + 1ull) * shape.outputs; ++i) {
      const double reference = want[i] + (shape.is_accumulating ? problem.y_value(before, i) : 0);
      const double difference = problem.y_value(got, i) - reference;
      error += difference * difference;
      norm += reference * reference;
    }
    if (!(std::sqrt(error / norm) <= worst)) worst = std::sqrt(error / norm);
  }
  const double limit = shape.y_dtype == KVS_F32 ? 1e-5 : shape.y_dtype == KVS_F16 ? 1e-3 : 5e-3;
  if (!(worst <= limit)) ++bench::failures;
  std::printf("%s %s (%u, %u, %u) x %u w %u y %u%s%s: %.1e\n", worst <= limit ? "ok   " : "WRONG", name_of(kernel),
              shape.rows, shape.outputs, shape.inputs, shape.x_dtype, shape.weight_dtype, shape.y_dtype,
              shape.has_bias ? " bias" : "", shape.is_accumulating ? " added" : "", worst);
}

void check_case(const Shape& shape, uint64_t seed) {
  for (const Kernel kernel : kernels) check_kernel(kernel, shape, seed);
}

void check_small(uint64_t seed) {
  for (const uint32_t rows : {17u, 40u, 64u}) {
    check_case({rows, 48, 136}, seed + rows);
    check_case({rows, 1040, 768, KVS_BF16, KVS_BF16, KVS_F32, true, true}, seed + rows + 1);
    check_case({rows, 16384, 264, KVS_F16, KVS_F16, KVS_F32, false, true}, seed + rows + 2);
    check_case({rows, 1040, 784, KVS_BF16, KVS_F8E4M3, KVS_BF16, true}, seed + rows + 3);
  }
  for (const uint32_t rows : {1u, 9u, 16u}) {
    check_case({rows, 24, 128, KVS_BF16, KVS_BF16, KVS_F32}, seed + rows);
    check_case({rows, 288, 768, KVS_BF16, KVS_BF16, KVS_BF16, true}, seed + rows + 1);
    check_case({rows, 512, 1024, KVS_F16, KVS_F8E4M3, KVS_F32}, seed + rows + 2);
    check_case({rows, 40, 192}, seed + rows + 4);  // units of half the size
    check_case({rows, 40, 384, KVS_BF16, KVS_F8E4M3}, seed + rows + 5);
    check_case({rows, 128, 14336, KVS_BF16, KVS_F8E4M3, KVS_BF16}, seed + rows + 3);  // K in slices
  }
}

void check_all(uint64_t seed) {
  check_small(seed);
  for (const uint32_t rows : {1u, 3u, 4u, 5u, 8u, 9u, 16u, 17u, 32u, 33u, 48u, 64u}) {
    check_case({rows, 4096, 4096}, seed + rows);
    check_case({rows, 5120, 13824, KVS_BF16, KVS_BF16, KVS_F32, false, true}, seed + rows + 1);
    check_case({rows, 1000, 1024, KVS_F16, KVS_F16, KVS_F16, true, false}, seed + rows + 2);
    check_case({rows, 32003, 512, KVS_BF16, KVS_BF16, KVS_F32, true, true}, seed + rows + 3);
    check_case({rows, 24, 128, KVS_BF16, KVS_BF16, KVS_F32}, seed + rows + 4);
    check_case({rows, 4096, 14336, KVS_BF16, KVS_F8E4M3, KVS_F32}, seed + rows + 5);
    for (const uint32_t inputs : {16u, 48u, 80u, 128u, 144u, 208u, 576u, 1072u, 2880u}) {  // whole blocks, and not
      check_case({rows, 208, inputs, KVS_BF16, KVS_F8E4M3, KVS_F32}, seed + rows + inputs);
      check_case({rows, 1040, inputs, KVS_F16, KVS_F8E4M3, KVS_F32, true, true}, seed + rows + inputs + 1);
    }
    check_case({rows, 6144, 4096, KVS_F16, KVS_F8E4M3, KVS_F16, true}, seed + rows + 6);
    check_case({rows, 288, 768, KVS_BF16, KVS_BF16, KVS_F32, false, false}, seed + rows + 7);
  }
}

constexpr uint64_t arena_bytes = 4300ull << 20;

void time_case(Kernel kernel, const Shape& shape, double copy_rate, char* arena) {
  const uint64_t bytes =
      static_cast<uint64_t>(shape.outputs) * shape.inputs * (shape.weight_dtype == KVS_F8E4M3 ? 1 : 2);
  const int copies =
      static_cast<int>(std::min<uint64_t>(arena_bytes / bytes, std::max<uint64_t>(4, (600ull << 20) / bytes)));
  const Problem problem(shape, 5, copies, arena);
  const Device<float> small(1);
  const kvs::SkinnyDevice device = problem.device();
  if (!supports(kernel, problem.product(), device)) return;
  const auto enqueue = [&](int copy, cudaStream_t stream) {
    multiply(kernel, problem.product(copy), device, stream);
  };
  const float chain = bench::time_graph_us([&](cudaStream_t s) {
                        for (int c = 0; c < copies; ++c) enqueue(c, s);
                      }) /
                      copies;
  const float between = bench::time_graph_us([&](cudaStream_t s) {
                          for (int c = 0; c < copies; ++c) {
                            bench::small_kernel<<<8, 32, 0, s>>>(small.get(), false);
                            enqueue(c, s);
                          }
                        }) /
                        copies;
  const float smalls = bench::time_graph_us([&](cudaStream_t s) {
                         for (int c = 0; c < copies; ++c) bench::small_kernel<<<8, 32, 0, s>>>(small.get(), false);
                       }) /
                       copies;
  const double floor_us = static_cast<double>(bytes) / copy_rate / 1e6;
  std::printf(
      "%s %s rows %2u  %6u x %5u  %6.1f MB  floor %6.1f us  chain %6.1f us %5.2f TB/s (%3.0f%%)  after a small kernel "
      "%6.1f us"
      " %5.2f TB/s\n",
      name_of(kernel), shape.weight_dtype == KVS_F8E4M3 ? "fp8 " : "bf16", shape.rows, shape.outputs, shape.inputs,
      static_cast<double>(bytes) / 1e6, floor_us, chain, static_cast<double>(bytes) / chain / 1e6,
      100 * floor_us / chain, between - smalls, static_cast<double>(bytes) / (between - smalls) / 1e6);
}

struct Layer {
  const char* name;
  uint32_t hidden, intermediate, qkv;
};

/** The products between two attentions one behind the other, the gate in its product. */
void time_layer(Kernel kernel, const Layer& layer, uint32_t rows, kvs_dtype weight_dtype, double copy_rate,
                char* arena) {
  const uint64_t value_bytes = weight_dtype == KVS_F8E4M3 ? 1 : 2;
  const uint32_t hidden = layer.hidden;
  const uint32_t sizes[4][2] = {
      {hidden, hidden}, {2 * layer.intermediate, hidden}, {hidden, layer.intermediate}, {layer.qkv, hidden}};
  uint64_t layer_bytes = 0;
  for (const auto& size : sizes) layer_bytes += static_cast<uint64_t>(size[0]) * size[1] * value_bytes;
  const int copies = static_cast<int>(arena_bytes / layer_bytes);
  const Problem problem({rows, 8, 256}, 5);  // for its workspace
  const kvs::SkinnyDevice device = problem.device();
  const auto buffer = [&](uint32_t columns) { return Device<__nv_bfloat16>(uint64_t{rows} * columns); };
  Device<float> sum(uint64_t{rows} * hidden);
  Device<__nv_bfloat16> attended = buffer(hidden), normed = buffer(hidden), mlp_in = buffer(2 * layer.intermediate),
                        mlp_out = buffer(layer.intermediate), qkv = buffer(layer.qkv);
  Device<float> scales(2 * layer.intermediate);
  bench::randomize(attended.get(), attended.count(), 1);
  bench::randomize(sum.get(), sum.count(), 2);
  bench::randomize(normed.get(), normed.count(), 4);
  bench::randomize(mlp_out.get(), mlp_out.count(), 3);
  bench::randomize(scales.get(), scales.count(), 5, 0.01f);
  const auto products = [&](int copy) {
    std::vector<kvs::SkinnyProduct> all(4);
    const char* weight = arena + layer_bytes * copy;
    for (int i = 0; i < 4; ++i) {
      all[i].x_dtype = all[i].y_dtype = KVS_BF16;
      all[i].weight_dtype = weight_dtype;
      all[i].rows = rows;
      all[i].outputs = sizes[i][0];
      all[i].inputs = sizes[i][1];
      all[i].weight = weight;
      all[i].scales = scales.get();
      weight += static_cast<uint64_t>(sizes[i][0]) * sizes[i][1] * value_bytes;
    }
    for (const int i : {0, 2}) {
      all[i].y = sum.get();
      all[i].y_dtype = KVS_F32;
      all[i].is_accumulating = true;
    }
    all[0].x = attended.get();
    all[1].x = normed.get(), all[1].y = mlp_in.get(), all[1].gated = mlp_out.get();
    all[2].x = mlp_out.get();
    all[3].x = normed.get(), all[3].y = qkv.get();
    return all;
  };
  for (const kvs::SkinnyProduct& product : products(0)) {
    if (!supports(kernel, product, device)) return;
  }
  const float time = bench::time_graph_us([&](cudaStream_t stream) {
                       for (int copy = 0; copy < copies; ++copy) {
                         for (const kvs::SkinnyProduct& product : products(copy)) {
                           multiply(kernel, product, device, stream);
                         }
                       }
                     }) /
                     copies;
  const double floor_us = static_cast<double>(layer_bytes) / copy_rate / 1e6;
  std::printf("%s %s rows %2u  products of a layer of %s  %6.1f MB  floor %6.1f us  chain %6.1f us (%3.0f%%)\n",
              name_of(kernel), weight_dtype == KVS_F8E4M3 ? "fp8 " : "bf16", rows, layer.name,
              static_cast<double>(layer_bytes) / 1e6, floor_us, time, 100 * floor_us / time);
}

constexpr uint32_t row_counts[] = {1, 4, 8, 16, 32, 48, 64};

void time_layers(double copy_rate, char* arena) {
  const Layer layers[] = {{"8B ", 4096, 14336, 6144}, {"13B", 5120, 13824, 15360}, {"32B", 5120, 27648, 7168}};
  for (const Kernel kernel : kernels) {
    for (const kvs_dtype dtype : {KVS_BF16, KVS_F8E4M3}) {
      for (const Layer& layer : layers) {
        for (const uint32_t rows : row_counts) time_layer(kernel, layer, rows, dtype, copy_rate, arena);
      }
    }
  }
}

void time_all(bool has_singles) {
  const double copy_rate = bench::copy_bandwidth();
  const Device<char> arena(arena_bytes);
  bench::randomize(reinterpret_cast<__nv_bfloat16*>(arena.get()), arena_bytes / 2, 7, 0.02f);
  std::printf("the first to be timed is slow, whatever it is:\n");
  time_case(Kernel::rings, {1, 8192, 8192}, copy_rate, arena.get());
  time_layers(copy_rate, arena.get());
  if (!has_singles) return;
  const uint32_t sizes[][2] = {{4096, 14336}, {6144, 4096}, {4096, 4096}, {28672, 4096}, {27648, 5120}, {15360, 5120},
                               {5120, 13824}, {5120, 5120}, {7168, 5120}, {5120, 27648}, {55296, 5120}, {128256, 4096}};
  for (const Kernel kernel : kernels) {
    for (const kvs_dtype dtype : {KVS_BF16, KVS_F8E4M3}) {
      for (const uint32_t rows : row_counts) {
        for (const auto& size : sizes) {
          time_case(kernel, {rows, size[0], size[1], KVS_BF16, dtype}, copy_rate, arena.get());
        }
      }
    }
  }
}

}  // namespace

int main(int argument_count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const uint64_t seed = argument_count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device{}();
  const std::string mode = argument_count > 2 ? arguments[2] : "both";
  bench::print_device();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  if (mode != "both" && mode != "check" && mode != "check-small" && mode != "time" && mode != "layers") {
    std::printf("no mode %s\n", mode.c_str());
    return 2;
  }
  const bool is_small = mode == "check-small";
  if (is_small) check_small(seed);
  if (mode == "check" || mode == "both") check_all(seed);
  if (mode != "time" && mode != "layers") {
    cudaDeviceProp gpu;
    BENCH_CHECK(cudaGetDeviceProperties(&gpu, 0));
    const bool is_hopper = gpu.major == 9 && gpu.minor == 0;
    bench::expect(checked[0] > 0 && (checked[1] > 0) == is_hopper, "each GPU has its kernels");
    std::printf("%d cases of rings, %d of stream-K: %d failures\n", checked[0], checked[1], bench::failures);
  }
  if (mode == "time" || mode == "both") time_all(true);
  if (mode == "layers") time_all(false);
  return bench::failures == 0 ? 0 : 1;
}
