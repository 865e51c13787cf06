// Checks the attention kernels against plain double arithmetic over odd shapes, then times them against the bytes or
// operations that they must move. Builds alone with nvcc: see run.sh. Arguments: seed, then what to do: check-decode,
// check-tiles, check-best, time-decode, time-tiles, time-best (default all; tiles: the mma.sync kernel also on Hopper).

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "../../sidecar/native/cuda/attention-kernels.h"
#include "gpu-bench.cuh"

namespace {

using bench::Device;

struct Shape {
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t rotary_dim;
  uint32_t block_tokens;
  uint32_t window = 0;
  bool has_alibi = false;
  kvs_dtype dtype = KVS_BF16;
  uint32_t layers = 3;
};

struct Sequence {
  int rows;
  int context;  // positions, these rows included
};

constexpr uint32_t max_positions = 33 * 1024;

/** A step and the KV blocks that it reads, on the device; what no row may read is NaN. */
class Problem {
 public:
  Problem(const Shape& shape, const std::vector<Sequence>& sequences, int padding, uint64_t seed,
          bool is_poisoned = true)
      : shape_(shape), sequences_(sequences), padding_(padding), seed_(seed), is_poisoned_(is_poisoned) {
    make_step();
    make_angles();
    make_blocks();
  }

  kvs::AttentionArgs args(uint32_t layer, bool is_captured) const {
    kvs::AttentionArgs a = {};
    a.y = y_->get();
    a.q = q_->get();
    a.kv = kv_->get() + layer * layer_bytes();
    a.block_stride_bytes = layer_bytes() * shape_.layers;
    a.kv_dtype = a.compute_dtype = shape_.dtype;
    a.rope_cosine = shape_.rotary_dim > 0 ? cosine_->get() : nullptr;
    a.rope_sine = shape_.rotary_dim > 0 ? sine_->get() : nullptr;
    a.alibi_slopes = shape_.has_alibi ? slopes_->get() : nullptr;
    a.window = shape_.window;
    a.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    a.heads = shape_.heads;
    a.kv_heads = shape_.kv_heads;
    a.head_dim = shape_.head_dim;
    a.rotary_dim = shape_.rotary_dim;
    a.block_tokens = shape_.block_tokens;
    a.step.counts = reinterpret_cast<const kvs::StepCounts*>(counts_->get());
    a.step.sequences = step_sequences_->get();
    a.step.row_sequence = row_sequence_->get();
    a.step.row_position = row_position_->get();
    a.step.block_table = table_->get();
    a.row_count = row_count();
    a.is_decode = std::all_of(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return s.rows == 1; });
    a.is_captured = is_captured;
    a.sequence_count = is_captured ? row_count() : static_cast<uint32_t>(sequences_.size());
    for (const Sequence& s : sequences_) {
      a.max_sequence_rows = std::max(a.max_sequence_rows, static_cast<uint32_t>(s.rows));
      a.max_context = std::max(a.max_context, static_cast<uint32_t>(s.context));
    }
    if (is_captured) a.max_context = max_positions;
    cudaDeviceProp properties;
    BENCH_CHECK(cudaGetDeviceProperties(&properties, 0));
    a.sm_count = properties.multiProcessorCount;
    a.compute_capability = properties.major * 10 + properties.minor;
    kvs_device_config config = {};
    config.heads = shape_.heads;
    config.kv_heads = shape_.kv_heads;
    config.head_dim = shape_.head_dim;
    config.max_positions = max_positions;
    config.max_rows = 8192;
    config.max_sequences = 256;
    a.workspace_bytes = kvs::attention_workspace_bytes(config, a.sm_count);
    if (!workspace_) {
      workspace_ = std::make_unique<Device<char>>(a.workspace_bytes);
      workspace_->fill_bytes(0);
    }
    a.workspace = workspace_->get();
    return a;
  }

  uint32_t row_count() const {
    int rows = padding_;
    for (const Sequence& s : sequences_) rows += s.rows;
    return static_cast<uint32_t>(rows);
  }
  uint64_t layer_bytes() const { return 2ull * shape_.kv_heads * shape_.block_tokens * shape_.head_dim * 2; }
  Device<uint16_t>& y() const { return *y_; }
  /** Bytes of K and V that decode must read. */
  double key_value_bytes() const {
    double tokens = 0;
    for (const Sequence& s : sequences_)
      tokens += shape_.window > 0 ? std::min<int>(s.context, shape_.window) : s.context;
    return tokens * 2 * shape_.kv_heads * shape_.head_dim * 2;
  }
  /** Multiplications and additions over what is visible. */
  double operations() const {
    double pairs = 0;
    for (const Sequence& s : sequences_) pairs += s.rows * (s.context - (s.rows - 1) / 2.0);
    return 4 * pairs * shape_.heads * shape_.head_dim;
  }
  void check(uint32_t layer, const char* name) const;

 private:
  void make_step();
  void make_angles();
  void make_blocks();

  Shape shape_;
  std::vector<Sequence> sequences_;
  int padding_;
  uint64_t seed_;
  bool is_poisoned_;
  int blocks_ = 0;
  std::vector<int> table_host_, position_host_, row_sequence_host_;
  std::vector<kvs_step_sequence> sequences_host_;
  std::unique_ptr<Device<uint16_t>> y_, q_;
  std::unique_ptr<Device<char>> kv_;
  std::unique_ptr<Device<float>> cosine_, sine_, slopes_;
  std::unique_ptr<Device<double>> frequencies_;
  std::unique_ptr<Device<int>> counts_, row_sequence_, row_position_, table_;
  std::unique_ptr<Device<kvs_step_sequence>> step_sequences_;
  mutable std::unique_ptr<Device<char>> workspace_;
};

void Problem::make_step() {
  std::mt19937_64 random(seed_);
  std::vector<int> first_visible_block;
  int row = 0;
  for (size_t s = 0; s < sequences_.size(); ++s) {
    const Sequence& sequence = sequences_[s];
    sequences_host_.push_back({0, row, sequence.rows, static_cast<int>(table_host_.size())});
    const int first_position = sequence.context - sequence.rows;
    const int first_key = shape_.window > 0 ? std::max(0, first_position + 1 - static_cast<int>(shape_.window)) : 0;
    for (int b = 0; b * static_cast<int>(shape_.block_tokens) < sequence.context; ++b) {
      table_host_.push_back(b < first_key / static_cast<int>(shape_.block_tokens) ? -1 : blocks_++);
    }
    for (int i = 0; i < sequence.rows; ++i, ++row) {
      row_sequence_host_.push_back(static_cast<int>(s));
      position_host_.push_back(first_position + i);
    }
  }
  for (int i = 0; i < padding_; ++i) {
    row_sequence_host_.push_back(-1);
    position_host_.push_back(0);
  }
  std::vector<int> ids(static_cast<size_t>(blocks_));
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  for (int& id : table_host_) id = id < 0 ? id : ids[static_cast<size_t>(id)];
  std::vector<kvs_step_sequence> padded = sequences_host_;
  padded.resize(std::max<size_t>(padded.size(), row_count()), {0, 0, 77, 1 << 20});  // stale records
  counts_ = std::make_unique<Device<int>>(
      std::vector<int>{static_cast<int>(row_count()), static_cast<int>(sequences_.size()), 0, 0});
  step_sequences_ = std::make_unique<Device<kvs_step_sequence>>(padded);
  row_sequence_ = std::make_unique<Device<int>>(row_sequence_host_);
  row_position_ = std::make_unique<Device<int>>(position_host_);
  table_ = std::make_unique<Device<int>>(table_host_);
  const uint64_t count = static_cast<uint64_t>(row_count()) * shape_.heads * shape_.head_dim;
  y_ = std::make_unique<Device<uint16_t>>(count);
  q_ = std::make_unique<Device<uint16_t>>(count);
  if (shape_.dtype == KVS_BF16) {
    bench::randomize(reinterpret_cast<__nv_bfloat16*>(q_->get()), count, seed_ + 1);
  } else {
    bench::randomize(reinterpret_cast<__half*>(q_->get()), count, seed_ + 1);
  }
}

__global__ void fill_angles(float* cosine, float* sine, const double* frequencies, int pairs, int positions) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<int64_t>(pairs) * positions;
       i += gridDim.x * blockDim.x) {
    double s, c;
    sincos(static_cast<double>(i / pairs) * frequencies[i % pairs], &s, &c);
    cosine[i] = static_cast<float>(c);
    sine[i] = static_cast<float>(s);
  }
}

void Problem::make_angles() {
  const int pairs = static_cast<int>(shape_.rotary_dim / 2);
  std::vector<double> frequencies;
  for (int i = 0; i < pairs; ++i) frequencies.push_back(std::pow(10000.0, -static_cast<double>(i) / pairs));
  frequencies_ = std::make_unique<Device<double>>(frequencies);
  cosine_ = std::make_unique<Device<float>>(static_cast<uint64_t>(pairs) * max_positions);
  sine_ = std::make_unique<Device<float>>(static_cast<uint64_t>(pairs) * max_positions);
  if (pairs > 0) fill_angles<<<1024, 256>>>(cosine_->get(), sine_->get(), frequencies_->get(), pairs, max_positions);
  std::vector<float> slopes;
  for (uint32_t h = 0; h < shape_.heads; ++h) slopes.push_back(std::exp2(-8.0f * (h + 1) / shape_.heads));
  slopes_ = std::make_unique<Device<float>>(slopes);
}

/** NaN in every token behind a sequence's last. One block a thread block. */
__global__ void poison_block(char* kv, uint64_t stride, const int* blocks, const int* used, int head_count,
                             int block_tokens, int head_dim) {
  uint16_t* block = reinterpret_cast<uint16_t*>(kv + blocks[blockIdx.x] * stride);
  const int from = used[blockIdx.x];
  const int tail = (block_tokens - from) * head_dim;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(head_count) * tail; i += blockDim.x) {
    block[i / tail * block_tokens * head_dim + from * head_dim + i % tail] = 0xffff;
  }
}

void Problem::make_blocks() {
  const uint64_t bytes = layer_bytes() * shape_.layers * static_cast<uint64_t>(blocks_);
  kv_ = std::make_unique<Device<char>>(bytes);
  if (shape_.dtype == KVS_BF16) {
    bench::randomize(reinterpret_cast<__nv_bfloat16*>(kv_->get()), bytes / 2, seed_ + 2);
  } else {
    bench::randomize(reinterpret_cast<__half*>(kv_->get()), bytes / 2, seed_ + 2);
  }
  if (!is_poisoned_) return;
  std::vector<int> blocks, used;
  for (size_t s = 0; s < sequences_.size(); ++s) {
    const int block_tokens = static_cast<int>(shape_.block_tokens);
    const int last = (sequences_[s].context - 1) / block_tokens;
    blocks.push_back(table_host_[static_cast<size_t>(sequences_host_[s].table_begin + last)]);
    used.push_back(sequences_[s].context - last * block_tokens);
  }
  const Device<int> device_blocks(blocks), device_used(used);
  const int heads = static_cast<int>(2 * shape_.kv_heads * shape_.layers);
  poison_block<<<static_cast<uint32_t>(blocks.size()), 256>>>(
      kv_->get(), layer_bytes() * shape_.layers, device_blocks.get(), device_used.get(), heads,
      static_cast<int>(shape_.block_tokens), static_cast<int>(shape_.head_dim));
  BENCH_CHECK(cudaDeviceSynchronize());
}

// ---- reference -----------------------------------------------------------------------------------------

template <typename T>
__device__ double value_of(const void* at, int64_t index) {
  return static_cast<double>(static_cast<float>(static_cast<const T*>(at)[index]));
}

/** One thread block a (row, head): scores, softmax and sum in double. rows: the rows to compute. */
template <typename T>
__global__ void reference_attention(double* y, const kvs::AttentionArgs args, const double* frequencies,
                                    const int* rows) {
  extern __shared__ double scores[];
  __shared__ double reduced[256];
  __shared__ double turned[512];
  const int row = rows[blockIdx.x];
  const int head = blockIdx.y;
  const int dim = static_cast<int>(args.head_dim);
  const int half = static_cast<int>(args.rotary_dim / 2);
  const int position = args.step.row_position[row];
  const int sequence = args.step.row_sequence[row];
  const int* table = args.step.block_table + args.step.sequences[sequence].table_begin;
  const int first = args.window > 0 ? max(0, position + 1 - static_cast<int>(args.window)) : 0;
  const int64_t at = (static_cast<int64_t>(row) * args.heads + head) * dim;
  const int64_t head_values = static_cast<int64_t>(args.block_tokens) * dim;
  const int kv_head = head / static_cast<int>(args.heads / args.kv_heads);
  const auto block_of = [&](int key) {
    return reinterpret_cast<const T*>(args.kv +
                                      table[key / static_cast<int>(args.block_tokens)] * args.block_stride_bytes) +
           kv_head * head_values + key % static_cast<int>(args.block_tokens) * dim;
  };
  double most = -1e300;
  int base = -1;
  for (int begin = first; begin <= position; begin += blockDim.x) {
    // Keys of one pass may lie in several blocks: turn q for one block after the other.
    const int end = min(begin + static_cast<int>(blockDim.x), position + 1);
    for (int b = begin / args.block_tokens; b <= (end - 1) / static_cast<int>(args.block_tokens); ++b) {
      if (b != base) {
        __syncthreads();
        for (int i = threadIdx.x; i < dim; i += blockDim.x) {
          double value = value_of<T>(args.q, at + i);
          if (i < 2 * half) {
            double s, c;
            sincos((position - b * static_cast<int>(args.block_tokens)) * frequencies[i % half], &s, &c);
            value = i < half ? value * c - value_of<T>(args.q, at + i + half) * s
                             : value * c + value_of<T>(args.q, at + i - half) * s;
          }
          turned[i] = value;
        }
        base = b;
        __syncthreads();
      }
      const int key = begin + threadIdx.x;
      if (key < end && key / static_cast<int>(args.block_tokens) == b) {
        const T* k = block_of(key);
        double dot = 0;
        for (int i = 0; i < dim; ++i) dot += turned[i] * value_of<T>(k, i);
        double score = dot * args.scale;
        if (args.alibi_slopes != nullptr) score += static_cast<double>(args.alibi_slopes[head]) * (key - position);
        scores[key - first] = score;
        most = max(most, score);
      }
    }
  }
  reduced[threadIdx.x] = most;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x); ++i) most = max(most, reduced[i]);
  double sum = 0;
  for (int key = first; key <= position; ++key) sum += exp(scores[key - first] - most);
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    double total = 0;
    for (int key = first; key <= position; ++key) {
      total += exp(scores[key - first] - most) * value_of<T>(block_of(key) + args.kv_heads * head_values, i);
    }
    y[(static_cast<int64_t>(blockIdx.x) * args.heads + head) * dim + i] = total / sum;
  }
}

float to_float(uint16_t bits, kvs_dtype dtype) {
  if (dtype == KVS_BF16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  __half half;
  std::memcpy(&half, &bits, 2);
  return __half2float(half);
}

void Problem::check(uint32_t layer, const char* name) const {
  const kvs::AttentionArgs a = args(layer, false);
  std::vector<int> rows;  // all of the first, then some of the rest
  const int real_rows = static_cast<int>(row_count()) - padding_;
  const int step = std::max(1, real_rows / 96);
  for (int r = 0; r < real_rows; r += r < 16 || r + step >= real_rows - 4 ? 1 : step) rows.push_back(r);
  const uint64_t width = static_cast<uint64_t>(shape_.heads) * shape_.head_dim;
  Device<int> device_rows(rows);
  Device<double> expected(rows.size() * width);
  const dim3 grid(static_cast<uint32_t>(rows.size()), shape_.heads);
  const int bytes = static_cast<int>(a.max_context) * 8;
  if (shape_.dtype == KVS_BF16) {
    BENCH_CHECK(cudaFuncSetAttribute(reference_attention<__nv_bfloat16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     200 << 10));
    reference_attention<__nv_bfloat16><<<grid, 128, bytes>>>(expected.get(), a, frequencies_->get(), device_rows.get());
  } else {
    BENCH_CHECK(
        cudaFuncSetAttribute(reference_attention<__half>, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
    reference_attention<__half><<<grid, 128, bytes>>>(expected.get(), a, frequencies_->get(), device_rows.get());
  }
  BENCH_CHECK(cudaGetLastError());
  const std::vector<double> want = expected.host();
  const std::vector<uint16_t> got = y_->host();
  double worst = 0, worst_head = 0, worst_ulps = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    double row_error = 0, row_norm = 0, row_max = 0, row_difference = 0;
    for (uint32_t h = 0; h < shape_.heads; ++h) {
      double error = 0, norm = 0;
      for (uint32_t d = 0; d < shape_.head_dim; ++d) {
        const double reference = want[i * width + h * shape_.head_dim + d];
        const double difference =
            to_float(got[static_cast<size_t>(rows[i]) * width + h * shape_.head_dim + d], shape_.dtype) - reference;
        error += difference * difference;
        norm += reference * reference;
        row_max = std::max(row_max, std::fabs(reference));
        if (!(std::fabs(difference) <= row_difference)) row_difference = std::fabs(difference);
      }
      row_error += error;
      row_norm += norm;
      if (!(std::sqrt(error / norm) <= worst_head)) worst_head = std::sqrt(error / norm);
    }
    if (!(std::sqrt(row_error / row_norm) <= worst)) worst = std::sqrt(row_error / row_norm);
    const double ulp = std::exp2(std::floor(std::log2(row_max)) - (shape_.dtype == KVS_BF16 ? 7 : 10));
    if (!(row_difference / ulp <= worst_ulps)) worst_ulps = row_difference / ulp;
  }
  bool are_padding_rows_zero = true;
  for (uint64_t i = static_cast<uint64_t>(real_rows) * width; i < got.size(); ++i) are_padding_rows_zero &= got[i] == 0;
  const double limit = shape_.dtype == KVS_BF16 ? 5e-3 : 1e-3;
  const bool is_right = worst <= limit && worst_head <= 4 * limit && worst_ulps <= 4 && are_padding_rows_zero;
  std::printf("%s %-46s row %.1e head %.1e ulps %.1f\n", is_right ? "ok   " : "WRONG", name, worst, worst_head,
              worst_ulps);
  if (!is_right) ++bench::failures;
}

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
    bench::small_kernel<<<8, 32, 0, s>>>(small.get());
    attend(layer, shape.rotary_dim, s);
  });
  const float smalls = per_layer([&](uint32_t, cudaStream_t s) { bench::small_kernel<<<8, 32, 0, s>>>(small.get()); });
  int blocks = 0;
  for (const Sequence& s : sequences) blocks += (s.context + shape.block_tokens - 1) / shape.block_tokens;
  const float plain = per_layer([&](uint32_t layer, cudaStream_t s) {
    read_blocks<<<a.sm_count * 8, 256, 0, s>>>(a.kv + layer * problem.layer_bytes(), a.block_stride_bytes,
                                               problem.layer_bytes(), blocks, small.get());
  });
  const double bytes = problem.key_value_bytes();
  const double floor_us = bytes / copy_rate / 1e6;
  std::printf(
      "%-22s %7.1f MB  floor %7.1f us  chain %7.1f (%4.1f%%)  again %7.1f  unturned %7.1f (turning %+.1f%%)  "
      "after a small kernel %7.1f (%4.1f%%)  plain read %7.1f\n",
      name, bytes / 1e6, floor_us, chain, 100 * floor_us / chain, again, unturned,
      100 * (std::min(chain, again) / unturned - 1), between - smalls, 100 * floor_us / (between - smalls), plain);
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
  const uint64_t seed = argument_count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device{}();
  const auto wants = [&](const char* part) {
    for (int i = 2; i < argument_count; ++i) {
      if (std::strcmp(arguments[i], part) == 0) return true;
    }
    return argument_count <= 2;
  };
  bench::print_device();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  if (wants("check-decode")) check_decode(seed);
  if (wants("check-tiles")) check_prefill(seed + 200, Kernel::tiles);
  if (wants("check-best")) check_prefill(seed + 100, Kernel::best);
  std::printf("%d failures\n", bench::failures);
  if (wants("time-decode")) time_decode_all();
  if (wants("time-tiles")) time_prefill_all(Kernel::tiles);
  if (wants("time-best")) time_prefill_all(Kernel::best);
  return bench::failures == 0 ? 0 : 1;
}
