// Checks the attention kernels against plain double arithmetic over odd shapes, then times them against the bytes or
// operations that they must move. Builds alone with nvcc: see run.sh. Arguments: seed, then what to do: check-small
// (for the sanitizer; only when named), check-decode, check-tiles, check-best, time-decode, time-tiles, time-best
// (default all others; tiles: the mma.sync kernel, also on Hopper).

#include <cstring>
#include <string>

#include "attention-problem.cuh"

namespace {

using bench::Device;
using bench::Problem;
using bench::Sequence;
using bench::Shape;

// ---- checks --------------------------------------------------------------------------------------------

enum class Kernel { best, tiles };

cudaError_t run(const kvs::AttentionArgs& args, Kernel kernel) {
  kvs::AttentionArgs a = args;
  if (kernel == Kernel::tiles) a.compute_capability = 80;  // the kernels of every GPU
  return kvs::attention(a);
}

void check_case(const char* name, const Shape& shape, const std::vector<Sequence>& sequences, int padding,
                uint64_t seed, Kernel kernel = Kernel::best) {
  Problem problem(shape, sequences, padding, seed);
  const uint32_t layer = shape.layers - 1;
  const bool is_captured = padding > 0;
  problem.y().fill_bytes(0xff);
  BENCH_CHECK(run(problem.args(layer, is_captured), kernel));
  BENCH_CHECK(cudaDeviceSynchronize());
  const std::vector<uint16_t> first = problem.y().host();
  problem.y().fill_bytes(0xff);
  BENCH_CHECK(run(problem.args(layer, is_captured), kernel));
  BENCH_CHECK(cudaDeviceSynchronize());
  bench::expect(first == problem.y().host(), "a second run gives other bits");
  problem.check(layer, name);
}

void check_decode(uint64_t seed) {
  std::printf("decode\n");
  const std::vector<Sequence> ragged = {{1, 1}, {1, 63}, {1, 64}, {1, 65}, {1, 700}, {1, 2048}, {1, 16}, {1, 4099}};
  check_case("8 kv heads of 4, d 128, ragged", {32, 8, 128, 128, 64}, ragged, 0, seed);
  check_case("the same, captured, 5 rows of padding", {32, 8, 128, 128, 64}, ragged, 5, seed + 1);
  check_case("one sequence of 8192", {32, 8, 128, 128, 64}, {{1, 8192}}, 0, seed + 2);
  check_case("one sequence of 3", {32, 8, 128, 128, 64}, {{1, 3}}, 0, seed + 3);
  check_case("40 heads, group 1", {40, 40, 128, 128, 64}, ragged, 0, seed + 4);
  check_case("group 5", {40, 8, 128, 128, 64}, ragged, 0, seed + 5);
  check_case("group 7, d 64", {14, 2, 64, 64, 64}, ragged, 0, seed + 6);
  check_case("group 8, blocks of 16", {32, 4, 128, 128, 16}, ragged, 0, seed + 7);
  check_case("group 16, blocks of 8", {32, 2, 128, 128, 8}, ragged, 0, seed + 8);
  check_case("group 71 of one kv head, d 64", {71, 1, 64, 64, 64}, ragged, 0, seed + 9);
  check_case("blocks of 256, window 100", {16, 4, 128, 128, 256, 100}, ragged, 0, seed + 10);
  check_case("blocks of 8, window 512", {16, 4, 128, 128, 8, 512}, ragged, 0, seed + 11);
  check_case("ALiBi, d 128", {32, 32, 128, 0, 64, 0, true}, ragged, 0, seed + 12);
  check_case("d 256, group 4", {16, 4, 256, 256, 64}, ragged, 0, seed + 13);
  check_case("d 256, group 16", {16, 1, 256, 128, 32}, ragged, 0, seed + 14);
  check_case("d 80, 32 turned", {32, 32, 80, 32, 64}, ragged, 0, seed + 15);
  check_case("d 96, d 32: 96", {12, 4, 96, 96, 16}, ragged, 0, seed + 16);
  check_case("d 32", {8, 8, 32, 32, 64}, ragged, 0, seed + 17);
  check_case("f16", {32, 8, 128, 128, 64, 0, false, KVS_F16}, ragged, 0, seed + 18);
  check_case("f16, d 64, group 12", {24, 2, 64, 64, 64, 0, false, KVS_F16}, ragged, 0, seed + 19);
  std::vector<Sequence> many;
  for (int i = 0; i < 200; ++i) many.push_back({1, 1 + i * 7 % 390});
  check_case("200 sequences", {32, 8, 128, 128, 64}, many, 56, seed + 20);
}

void check_prefill(uint64_t seed, Kernel kernel) {
  std::printf("prefill, %s\n", kernel == Kernel::best ? "best kernel" : "mma.sync");
  const std::vector<Sequence> ragged = {{5, 5}, {200, 200}, {1, 77}, {64, 1000}, {129, 2047}, {2, 640}, {1, 1300}};
  check_case("8 kv heads of 4, d 128, mixed", {32, 8, 128, 128, 64}, ragged, 0, seed, kernel);
  check_case("one of 1024", {32, 8, 128, 128, 64}, {{1024, 1024}}, 0, seed + 1, kernel);
  check_case("128 after 8192", {32, 8, 128, 128, 64}, {{128, 8320}}, 0, seed + 2, kernel);
  check_case("30 after 2000", {32, 8, 128, 128, 64}, {{30, 2030}}, 0, seed + 3, kernel);
  check_case("40 heads, group 1", {40, 40, 128, 128, 64}, ragged, 0, seed + 4, kernel);
  check_case("group 5", {40, 8, 128, 128, 64}, ragged, 0, seed + 5, kernel);
  check_case("group 7, d 64, blocks of 16", {14, 2, 64, 64, 16}, ragged, 0, seed + 6, kernel);
  check_case("group 16, blocks of 8", {32, 2, 128, 128, 8}, ragged, 0, seed + 7, kernel);
  check_case("group 71 of one kv head, d 64", {71, 1, 64, 64, 64}, ragged, 0, seed + 8, kernel);
  check_case("window 100, blocks of 256", {16, 4, 128, 128, 256, 100}, ragged, 0, seed + 9, kernel);
  check_case("window 300", {16, 4, 128, 128, 64, 300}, {{700, 1500}, {40, 900}}, 0, seed + 10, kernel);
  check_case("ALiBi", {32, 32, 128, 0, 64, 0, true}, ragged, 0, seed + 11, kernel);
  check_case("d 256", {16, 4, 256, 256, 64}, ragged, 0, seed + 12, kernel);
  check_case("d 80, 32 turned", {32, 32, 80, 32, 64}, ragged, 0, seed + 13, kernel);
  check_case("d 96", {12, 4, 96, 96, 16}, ragged, 0, seed + 14, kernel);
  check_case("d 32", {8, 8, 32, 32, 64}, ragged, 0, seed + 15, kernel);
  check_case("f16, d 64, group 12", {24, 2, 64, 64, 64, 0, false, KVS_F16}, ragged, 0, seed + 16, kernel);
  check_case("f16, d 128", {32, 8, 128, 128, 64, 0, false, KVS_F16}, ragged, 0, seed + 17, kernel);
  check_case("in passes: 9 of 3 heads after 30000", {32, 32, 128, 128, 64, 0, false, KVS_BF16, 1},
             {{9, 20009}, {9, 20009}, {9, 20009}}, 0, seed + 18, kernel);
}

/** A little of everything, for the sanitizer. */
void check_small(uint64_t seed) {
  std::printf("small\n");
  const std::vector<Sequence> rows = {{1, 1}, {1, 70}, {1, 200}, {1, 129}};
  check_case("decode", {8, 2, 128, 128, 64}, rows, 2, seed);
  check_case("decode, group 16, blocks of 8", {16, 1, 128, 64, 8}, rows, 0, seed + 1);
  check_case("decode, d 256, window", {4, 2, 256, 256, 16, 50}, rows, 0, seed + 2);
  check_case("decode, d 80, ALiBi", {6, 6, 80, 0, 64, 0, true}, rows, 0, seed + 3);
  const std::vector<Sequence> mixed = {{5, 5}, {1, 90}, {40, 300}, {2, 130}};
  for (const Kernel kernel : {Kernel::best, Kernel::tiles}) {
    check_case("prefill", {8, 2, 128, 128, 64}, mixed, 0, seed + 4, kernel);
    check_case("prefill, d 64, blocks of 8", {6, 2, 64, 32, 8}, mixed, 0, seed + 5, kernel);
    check_case("prefill, d 80, window", {4, 4, 80, 32, 32, 60}, mixed, 0, seed + 6, kernel);
  }
}

// ---- times ---------------------------------------------------------------------------------------------

/** Reads what decode attention reads, and nothing else: block after block, 16 bytes a lane. */
__global__ void read_blocks(const char* kv, uint64_t stride, uint64_t layer_bytes, int blocks, float* out) {
  float sum = 0;
  const int pieces = static_cast<int>(layer_bytes / 16384);
  for (int i = blockIdx.x; i < blocks * pieces; i += gridDim.x) {
    const uint4* from = reinterpret_cast<const uint4*>(kv + i / pieces * stride + i % pieces * 16384ull);
    uint4 value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = __ldcs(from + j * 256 + threadIdx.x);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += __uint_as_float(value[j].x ^ value[j].y ^ value[j].z ^ value[j].w);
  }
  if (sum == 1.2345f) *out = sum;
}

void time_decode(const char* name, Shape shape, const std::vector<Sequence>& sequences, double copy_rate) {
  const Problem problem(shape, sequences, 0, 7, false);
  const kvs::AttentionArgs a = problem.args(0, false);
  const Device<float> small(1);
  const auto per_layer = [&](const std::function<void(uint32_t, cudaStream_t)>& enqueue) {
    return bench::time_graph_us([&](cudaStream_t stream) {
             for (uint32_t layer = 0; layer < shape.layers; ++layer) enqueue(layer, stream);
           }) /
           static_cast<float>(shape.layers);
  };
  const auto attend = [&](uint32_t layer, uint32_t rotary_dim, cudaStream_t stream) {
    kvs::AttentionArgs a = problem.args(layer, false);
    a.rotary_dim = rotary_dim;
    a.stream = stream;
    BENCH_CHECK(kvs::attention(a));
  };
  const float chain = per_layer([&](uint32_t layer, cudaStream_t s) { attend(layer, shape.rotary_dim, s); });
  const float unturned = per_layer([&](uint32_t layer, cudaStream_t s) { attend(layer, 0, s); });
  const float again = per_layer([&](uint32_t layer, cudaStream_t s) { attend(layer, shape.rotary_dim, s); });
  const float between = per_layer([&](uint32_t layer, cudaStream_t s) {
    bench::small_kernel<<<8, 32, 0, s>>>(small.get(), false);
    attend(layer, shape.rotary_dim, s);
  });
  const float behind = per_layer([&](uint32_t layer, cudaStream_t s) {
    bench::small_kernel<<<8, 32, 0, s>>>(small.get(), true);
    attend(layer, shape.rotary_dim, s);
  });
  const float smalls =
      per_layer([&](uint32_t, cudaStream_t s) { bench::small_kernel<<<8, 32, 0, s>>>(small.get(), false); });
  int blocks = 0;
  for (const Sequence& s : sequences) blocks += (s.context + shape.block_tokens - 1) / shape.block_tokens;
  const float plain = per_layer([&](uint32_t layer, cudaStream_t s) {
    read_blocks<<<a.sm_count * 8, 256, 0, s>>>(a.kv + layer * problem.layer_bytes(), a.block_stride_bytes,
                                               problem.layer_bytes(), blocks, small.get());
  });
  const double bytes = problem.key_value_bytes();
  const double floor_us = bytes / copy_rate / 1e6;
  std::printf(
      "%-22s %7.1f MB  floor %6.1f us  chain %6.1f (%4.1f%%) again %6.1f  unturned %6.1f (turning %+.1f%%)  after a "
      "small "
      "kernel %6.1f (%4.1f%%), one that lets it start %6.1f (%4.1f%%)  plain read %6.1f\n",
      name, bytes / 1e6, floor_us, chain, 100 * floor_us / chain, again, unturned,
      100 * (std::min(chain, again) / unturned - 1), between - smalls, 100 * floor_us / (between - smalls),
      behind - smalls, 100 * floor_us / (behind - smalls), plain);
}

void time_prefill(const char* name, Shape shape, const std::vector<Sequence>& sequences, Kernel kernel) {
  const Problem problem(shape, sequences, 0, 7, false);
  problem.args(0, false);  // allocates
  const auto time = [&](bool with_rotation) {
    return bench::time_graph_us([&](cudaStream_t stream) {
             for (uint32_t layer = 0; layer < shape.layers; ++layer) {
               kvs::AttentionArgs a = problem.args(layer, false);
               a.stream = stream;
               if (!with_rotation) a.rotary_dim = 0;
               BENCH_CHECK(run(a, kernel));
             }
           }) /
           static_cast<float>(shape.layers);
  };
  const float us = time(true);
  const float again = time(true);
  std::printf("%-34s %-10s %8.1f us (again %8.1f)  %6.1f TFLOP/s\n", name, kernel == Kernel::best ? "best" : "mma.sync",
              us, again, problem.operations() / us / 1e6);
}

void time_decode_all() {
  const double copy_rate = bench::copy_bandwidth();
  const auto batch = [](int count, int context) {
    return std::vector<Sequence>(static_cast<size_t>(count), Sequence{1, context});
  };
  const Shape small = {32, 8, 128, 128, 64, 0, false, KVS_BF16, 32};  // 8B
  const Shape wide = {40, 40, 128, 128, 64, 0, false, KVS_BF16, 30};  // 13B
  const Shape large = {40, 8, 128, 128, 64, 0, false, KVS_BF16, 48};  // 32B
  time_decode("8B 64 x 2048", small, batch(64, 2048), copy_rate);
  time_decode("8B 1 x 8192", small, batch(1, 8192), copy_rate);
  time_decode("8B 1 x 2048", small, batch(1, 2048), copy_rate);
  time_decode("8B 16 x 2048", small, batch(16, 2048), copy_rate);
  time_decode("13B 24 x 2048", wide, batch(24, 2048), copy_rate);
  time_decode("13B 1 x 2048", wide, batch(1, 2048), copy_rate);
  time_decode("32B 32 x 2048", large, batch(32, 2048), copy_rate);
  std::vector<Sequence> uneven = batch(31, 512);
  uneven.push_back({1, 32768});
  time_decode("8B 31 x 512 + 32768", small, uneven, copy_rate);
  time_decode("d 64, 32/8, 64 x 2048", {32, 8, 64, 64, 64, 0, false, KVS_BF16, 32}, batch(64, 2048), copy_rate);
}

void time_prefill_all(Kernel kernel) {
  time_prefill("causal 4096, 40 heads, d 128", {40, 40, 128, 128, 64, 0, false, KVS_BF16, 4}, {{4096, 4096}}, kernel);
  time_prefill("causal 2048, 40 heads, d 128", {40, 40, 128, 128, 64, 0, false, KVS_BF16, 4}, {{2048, 2048}}, kernel);
  time_prefill("8B causal 8192", {32, 8, 128, 128, 64, 0, false, KVS_BF16, 4}, {{8192, 8192}}, kernel);
  time_prefill("8B 128 after 8192", {32, 8, 128, 128, 64, 0, false, KVS_BF16, 8}, {{128, 8320}}, kernel);
  time_prefill("8B 30 after 8192", {32, 8, 128, 128, 64, 0, false, KVS_BF16, 8}, {{30, 8222}}, kernel);
  time_prefill("13B 128 after 2048", {40, 40, 128, 128, 64, 0, false, KVS_BF16, 8}, {{128, 2176}}, kernel);
  time_prefill("32B 128 after 8192", {40, 8, 128, 128, 64, 0, false, KVS_BF16, 8}, {{128, 8320}}, kernel);
  time_prefill("d 64, 32 heads, causal 4096", {32, 32, 64, 64, 64, 0, false, KVS_BF16, 4}, {{4096, 4096}}, kernel);
  time_prefill("d 256, 16 heads, causal 4096", {16, 16, 256, 256, 64, 0, false, KVS_BF16, 4}, {{4096, 4096}}, kernel);
}

}  // namespace

int main(int argument_count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const uint64_t seed = argument_count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device{}();
  const auto wants = [&](const char* part) {
    for (int i = 2; i < argument_count; ++i) {
      if (std::strcmp(arguments[i], part) == 0) return true;
    }
    return argument_count <= 2;
  };
  bench::print_device();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  if (argument_count > 2 && wants("check-small")) check_small(seed);
  if (wants("check-decode")) check_decode(seed);
  if (wants("check-tiles")) check_prefill(seed + 200, Kernel::tiles);
  if (wants("check-best")) check_prefill(seed + 100, Kernel::best);
  std::printf("%d failures\n", bench::failures);
  if (wants("time-decode")) time_decode_all();
  if (wants("time-tiles")) time_prefill_all(Kernel::tiles);
  if (wants("time-best")) time_prefill_all(Kernel::best);
  return bench::failures == 0 ? 0 : 1;
}
