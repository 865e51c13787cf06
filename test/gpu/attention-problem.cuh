// A step of attention to check or time: sequences, blocks of random KV in which NaN is whatever no row may read, and
// plain double arithmetic to compare with.

#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "../../sidecar/native/cuda/attention-kernels.h"
#include "gpu-bench.cuh"

namespace bench {

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

/** With a name of its own, which vectors of C++20 need in nvcc. */
struct SequenceRecord : kvs_step_sequence {};

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
  std::vector<SequenceRecord> sequences_host_;
  std::unique_ptr<Device<uint16_t>> y_, q_;
  std::unique_ptr<Device<char>> kv_;
  std::unique_ptr<Device<float>> cosine_, sine_, slopes_;
  std::unique_ptr<Device<double>> frequencies_;
  std::unique_ptr<Device<int>> counts_, row_sequence_, row_position_, table_;
  std::unique_ptr<Device<SequenceRecord>> step_sequences_;
  mutable std::unique_ptr<Device<char>> workspace_;
};

void Problem::make_step() {
  std::mt19937_64 random(seed_);
  std::vector<int> first_visible_block;
  int row = 0;
  for (size_t s = 0; s < sequences_.size(); ++s) {
    const Sequence& sequence = sequences_[s];
    sequences_host_.push_back({{0, row, sequence.rows, static_cast<int>(table_host_.size())}});
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
  std::vector<SequenceRecord> padded = sequences_host_;
  padded.resize(std::max<size_t>(padded.size(), row_count()), SequenceRecord{{0, 0, 77, 1 << 20}});  // stale records
  counts_ = std::make_unique<Device<int>>(
      std::vector<int>{static_cast<int>(row_count()), static_cast<int>(sequences_.size()), 0, 0});
  step_sequences_ = std::make_unique<Device<SequenceRecord>>(padded);
  row_sequence_ = std::make_unique<Device<int>>(row_sequence_host_);
  row_position_ = std::make_unique<Device<int>>(position_host_);
  table_ = std::make_unique<Device<int>>(table_host_);
  const uint64_t count = static_cast<uint64_t>(row_count()) * shape_.heads * shape_.head_dim;
  y_ = std::make_unique<Device<uint16_t>>(count);
  q_ = std::make_unique<Device<uint16_t>>(count);
  if (shape_.dtype == KVS_BF16) {
    randomize(reinterpret_cast<__nv_bfloat16*>(q_->get()), count, seed_ + 1);
  } else {
    randomize(reinterpret_cast<__half*>(q_->get()), count, seed_ + 1);
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
    randomize(reinterpret_cast<__nv_bfloat16*>(kv_->get()), bytes / 2, seed_ + 2);
  } else {
    randomize(reinterpret_cast<__half*>(kv_->get()), bytes / 2, seed_ + 2);
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
  // A row of few values has no mean to speak of: of these problems with rows of 256, a third go past 5e-3 by their
  // roundings alone (see NOTES.md).
  const bool is_short = shape_.heads * shape_.head_dim < 512;
  const double limit = shape_.dtype != KVS_BF16 ? 1e-3 : is_short ? 8e-3 : 5e-3;
  const bool is_right = worst <= limit && worst_head <= 4 * limit && worst_ulps <= 4 && are_padding_rows_zero;
  std::printf("%s %-46s row %.1e head %.1e ulps %.1f\n", is_right ? "ok   " : "WRONG", name, worst, worst_head,
              worst_ulps);
  if (!is_right) ++failures;
}

}  // namespace bench
