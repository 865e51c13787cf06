// Checks gate and up of many rows against double arithmetic over odd shapes, then times them beside cuBLASLt with a
// kernel for the gate, in bursts and under sustained load. Builds alone with nvcc: see run.sh. Arguments: seed, then
// check, check-small (few, for the sanitizer) or time (default check and time).

#include <unistd.h>

#include <cmath>
#include <random>
#include <string>

#include "../../sidecar/native/cuda/library-matmul.h"
#include "../../sidecar/native/cuda/prompt-matmul.h"
#include "prompt-problem.cuh"

/** By its address the library's plans find their folder. */
extern "C" uint32_t kvs_abi_version(void) { return 0; }

namespace {

using bench::Device;
using bench::Errors;
using bench::Problem;
using bench::Shape;

int passed = 0;
void count(bool is_right) { ++(is_right ? passed : bench::failures); }

// ---- checks ---------------------------------------------------------------------------------------------------

kvs::SkinnyDevice device_of(int sm_count = 0) {
  cudaDeviceProp gpu;
  BENCH_CHECK(cudaGetDeviceProperties(&gpu, 0));
  kvs::SkinnyDevice device = {};
  device.sm_count = sm_count == 0 ? gpu.multiProcessorCount : sm_count;
  device.compute_capability = gpu.major * 10 + gpu.minor;
  return device;
}

/** sm_count: as if the GPU had so many, so that each block has several tiles. */
void check_case(const Shape& shape, uint64_t seed, kvs::PromptCluster cluster, int sm_count = 0) {
  Problem problem(shape, seed);
  const kvs::SkinnyProduct a = problem.product();
  const kvs::SkinnyDevice device = device_of(sm_count);
  const bool is_supported = kvs::prompt_matmul_supports(a, device);
  const uint64_t values = static_cast<uint64_t>(shape.rows) * shape.columns();
  Device<double> expected(values);
  bench::reference_product<<<static_cast<uint32_t>((values + 127) / 128), 128>>>(expected.get(), a);
  const auto run = [&](bool& is_intact) {
    problem.poison();
    BENCH_CHECK(kvs::prompt_matmul(a, device, nullptr, cluster));
    BENCH_CHECK(cudaDeviceSynchronize());
    return problem.result(is_intact);
  };
  bool is_intact = true;
  bool is_intact_again = true;
  const std::vector<uint16_t> got = run(is_intact);
  const bool is_same = got == run(is_intact_again);
  const Errors errors(shape, got, expected.host());
  const double limit = shape.dtype == KVS_F16 ? 1e-3 : 5e-3;
  const bool is_right = is_supported && is_intact && is_intact_again && is_same && errors.are_values_near &&
                        errors.row <= limit;
  count(is_right);
  std::printf("%s (%u, %u, %u) %s%s cluster %d, %d SMs: %.1e%s%s%s%s\n", is_right ? "ok   " : "WRONG", shape.rows,
              shape.outputs, shape.inputs, shape.dtype == KVS_F16 ? "f16" : "bf16", shape.has_bias ? " bias" : "",
              static_cast<int>(cluster), device.sm_count, errors.row, is_supported ? "" : ", not supported",
              is_intact && is_intact_again ? "" : ", wrote beside its results",
              is_same ? "" : ", a second run gives other bits",
              errors.are_values_near ? "" : ", single values far off");
}

constexpr kvs::PromptCluster clusters[] = {kvs::PromptCluster::one, kvs::PromptCluster::two};

void check_small(uint64_t seed) {
  for (const kvs::PromptCluster cluster : clusters) {
    check_case({65, 48, 72, KVS_BF16}, seed, cluster);
    check_case({200, 560, 264, KVS_F16, true}, seed + 1, cluster, 4);
    check_case({300, 784, 328, KVS_BF16}, seed + 2, cluster, 6);
  }
}

void check_all(uint64_t seed) {
  check_small(seed);
  const uint32_t sizes[][3] = {{1, 16, 8},      {66, 272, 72},    {127, 656, 1000},  {128, 1040, 64},
                               {129, 944, 456}, {191, 1296, 520}, {257, 528, 1544},  {385, 2064, 248}};
  const uint32_t large[][3] = {{2100, 5152, 776}, {2048, 5120, 512}, {1000, 12304, 264}};  // several rounds, halves
  uint64_t number = seed;
  for (const kvs_dtype dtype : {KVS_BF16, KVS_F16}) {
    for (const bool has_bias : {false, true}) {
      for (const auto& size : sizes) {
        for (const kvs::PromptCluster cluster : clusters) {
          for (const int sm_count : {0, 4, 10}) {
            check_case({size[0], size[1], size[2], dtype, has_bias}, ++number, cluster, sm_count);
          }
        }
      }
      for (const auto& size : large) {
        check_case({size[0], size[1], size[2], dtype, has_bias}, ++number, kvs::PromptCluster::fastest);
      }
    }
  }
}

// ---- times ----------------------------------------------------------------------------------------------------

using Enqueue = std::function<void(cudaStream_t, int)>;  // with one of several copies of the weights

float milliseconds_of(const Enqueue& enqueue, cudaStream_t stream, int times) {
  cudaEvent_t begin, end;
  BENCH_CHECK(cudaEventCreate(&begin));
  BENCH_CHECK(cudaEventCreate(&end));
  BENCH_CHECK(cudaEventRecord(begin, stream));
  for (int i = 0; i < times; ++i) enqueue(stream, i);
  BENCH_CHECK(cudaEventRecord(end, stream));
  BENCH_CHECK(cudaEventSynchronize(end));
  float ms = 0;
  BENCH_CHECK(cudaEventElapsedTime(&ms, begin, end));
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return ms / times;
}

/** A few launches on a card that has rested. */
float burst_ms(const Enqueue& enqueue, cudaStream_t stream) {
  const float rough = milliseconds_of(enqueue, stream, 2);
  const int times = std::max(4, std::min(40, static_cast<int>(4.0f / rough)));
  std::vector<float> all;
  for (int i = 0; i < 3; ++i) {
    usleep(6000);
    milliseconds_of(enqueue, stream, 2);
    all.push_back(milliseconds_of(enqueue, stream, times));
  }
  return bench::median(all);
}

/** A quarter of a second of it, after a tenth that does not count. */
float sustained_ms(const Enqueue& enqueue, cudaStream_t stream, float rough) {
  milliseconds_of(enqueue, stream, static_cast<int>(100.0f / rough) + 1);
  return milliseconds_of(enqueue, stream, static_cast<int>(250.0f / rough) + 1);
}

/** What the gate costs as a kernel of its own. */
__global__ void silu_mul(__nv_bfloat16* to, const __nv_bfloat16* from, uint32_t columns) {
  const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= columns) return;
  const uint64_t row = blockIdx.y;
  const uint4 gates = *reinterpret_cast<const uint4*>(from + row * 2 * columns + i);
  const uint4 ups = *reinterpret_cast<const uint4*>(from + row * 2 * columns + columns + i);
  uint4 out;
  for (int k = 0; k < 8; ++k) {
    const float gate = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(&gates)[k]);
    const float up = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(&ups)[k]);
    reinterpret_cast<__nv_bfloat16*>(&out)[k] = __float2bfloat16(gate / (1.0f + expf(-gate)) * up);
  }
  *reinterpret_cast<uint4*>(to + row * columns + i) = out;
}

std::unique_ptr<kvs::LibraryMatmul> open_library() {
  try {
    kvs::Gpu gpu = {};
    cudaDeviceProp properties;
    BENCH_CHECK(cudaGetDeviceProperties(&properties, 0));
    gpu.name = properties.name;
    return std::make_unique<kvs::LibraryMatmul>(gpu);
  } catch (const std::exception& error) {
    std::printf("no library to compare with: %s\n", error.what());
    return nullptr;
  }
}

struct Arena {
  Device<__nv_bfloat16> weights{600ull << 20};
  Device<__nv_bfloat16> x{2048ull * 5120};
  Device<__nv_bfloat16> y{2048ull * 55296};
  Device<__nv_bfloat16> gated{2048ull * 27648};
  cudaStream_t stream = nullptr;

  Arena() {
    bench::randomize(weights.get(), weights.count(), 7, 0.02f);
    bench::randomize(x.get(), x.count(), 8);
    y.fill_bytes(0);
    BENCH_CHECK(cudaDeviceSynchronize());
    BENCH_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
};

/** All ways to compute one shape. */
class Contest {
 public:
  Contest(const Shape& shape, const Arena& arena, kvs::LibraryMatmul* library)
      : shape_(shape),
        arena_(arena),
        library_(library),
        weights_(static_cast<uint64_t>(shape.outputs) * shape.inputs),
        copies_(static_cast<int>(std::min<uint64_t>(arena.weights.count() / weights_,
                                                    std::max<uint64_t>(1, (150ull << 20) / weights_)))) {}

  Enqueue own(kvs::PromptCluster cluster = kvs::PromptCluster::fastest) const {
    return [this, cluster, device = device_of()](cudaStream_t stream, int i) {
      kvs::SkinnyProduct a = product();
      a.weight = weight(i);
      BENCH_CHECK(kvs::prompt_matmul(a, device, stream, cluster));
    };
  }
  /** has_gate: its kernel, too. */
  Enqueue library(bool has_gate) const {
    return [this, has_gate](cudaStream_t stream, int i) {
      kvs::Product product = {};
      product.shape = {CUDA_R_16BF, CUDA_R_16BF, shape_.rows, shape_.outputs, shape_.inputs, false, false, false};
      product.y = arena_.y.get();
      product.x = arena_.x.get();
      product.weight = weight(i);
      library_->enqueue(product, stream);
      if (!has_gate) return;
      const uint32_t columns = shape_.columns();
      silu_mul<<<dim3((columns / 8 + 255) / 256, shape_.rows), 256, 0, stream>>>(arena_.gated.get(), arena_.y.get(),
                                                                                columns);
    };
  }

  void print_bursts() const {
    std::printf("%5u %6u x %5u  %4.2f |", shape_.rows, shape_.outputs, shape_.inputs,
                kvs::prompt_matmul_use(product(), device_of()));
    for (const bool has_gate : {false, true}) {
      print(library_ != nullptr ? burst_ms(library(has_gate), arena_.stream) : 0);
    }
    print(burst_ms(own(), arena_.stream));
    for (const kvs::PromptCluster cluster : clusters) print(burst_ms(own(cluster), arena_.stream));
    std::printf("\n");
  }
  /** Twice: a card warms up. */
  void print_sustained() const {
    std::printf("%5u %6u x %5u       |", shape_.rows, shape_.outputs, shape_.inputs);
    for (int i = 0; i < 2; ++i) {
      print(library_ != nullptr ? sustained(library(true)) : 0);
      print(sustained(own()));
    }
    std::printf("\n");
  }

 private:
  const __nv_bfloat16* weight(int i) const { return arena_.weights.get() + i % copies_ * weights_; }
  kvs::SkinnyProduct product() const {
    kvs::SkinnyProduct a = {};
    a.x = arena_.x.get();
    a.gated = arena_.gated.get();
    a.y_dtype = a.x_dtype = a.weight_dtype = KVS_BF16;
    a.rows = shape_.rows;
    a.outputs = shape_.outputs;
    a.inputs = shape_.inputs;
    return a;
  }
  float sustained(const Enqueue& enqueue) const {
    return sustained_ms(enqueue, arena_.stream, milliseconds_of(enqueue, arena_.stream, 3));
  }
  void print(float ms) const {
    const double operations = 2.0 * shape_.rows * shape_.outputs * shape_.inputs;
    std::printf(" %7.1f", ms > 0 ? operations / ms / 1e9 : 0.0);
  }

  Shape shape_;
  const Arena& arena_;
  kvs::LibraryMatmul* library_;
  uint64_t weights_;
  int copies_;
};

void time_all() {
  const Arena arena;
  const std::unique_ptr<kvs::LibraryMatmul> library = open_library();
  constexpr uint32_t sizes[][2] = {{28672, 4096}, {27648, 5120}, {55296, 5120}};  // of an 8B, a 13B and a 32B model
  std::printf(
      "TFLOP/s in bursts; use: the share of the multiprocessors' time for products\n"
      " rows outputs x inputs   use | library, + gate     own   alone   pairs\n");
  for (const uint32_t rows : {2048u, 1024u, 512u, 384u, 256u, 128u}) {
    for (const auto& size : sizes) Contest({rows, size[0], size[1]}, arena, library.get()).print_bursts();
  }
  std::printf("TFLOP/s, sustained: library and gate, own, library and gate, own\n");
  for (const auto& size : sizes) Contest({2048, size[0], size[1]}, arena, library.get()).print_sustained();
  BENCH_CHECK(cudaStreamDestroy(arena.stream));
}

}  // namespace

int main(int argument_count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const uint64_t seed = argument_count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device{}();
  const std::string mode = argument_count > 2 ? arguments[2] : "both";
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  if (mode != "both" && mode != "check" && mode != "check-small" && mode != "time") {
    std::printf("no mode %s\n", mode.c_str());
    return 2;
  }
  bench::print_device();
  if (mode == "check-small") check_small(seed);
  if (mode == "check" || mode == "both") check_all(seed);
  if (mode != "time") std::printf("%d passed, %d failed\n", passed, bench::failures);
  if (mode == "time" || mode == "both") time_all();
  return bench::failures == 0 ? 0 : 1;
}
