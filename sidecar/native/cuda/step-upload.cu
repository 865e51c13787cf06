// Copies inside the device are cheap; what matters is that no kernel waits for the bus.

#include <algorithm>

#include "host-read.h"
#include "step-upload.h"

namespace kvs {

namespace {

constexpr uint32_t spread_threads = 256;
constexpr uint32_t spread_blocks = 16;

/** One array of the step: int32s from the upload to their fixed place. */
struct Segment {
  int32_t* to;
  const int32_t* from;
  uint32_t ints;
};

enum SegmentIndex { of_sequences, of_row_sequence, of_row_position, of_logit_row, of_block_table, segment_count };

struct Spread {
  Segment segments[segment_count];
  int32_t* row_block;
  uint32_t block_tokens;
  StepCounts* counts;
  StepCounts values;
};

__global__ void spread_step(const __grid_constant__ Spread spread) {
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  if (first == 0) *spread.counts = spread.values;
  for (const Segment& segment : spread.segments) {
    for (uint32_t i = first; i < segment.ints; i += gridDim.x * blockDim.x) segment.to[i] = segment.from[i];
  }
  // What every layer's kernels would look up one load after the other.
  const kvs_step_sequence* sequences = reinterpret_cast<const kvs_step_sequence*>(spread.segments[of_sequences].from);
  const int32_t* row_sequence = spread.segments[of_row_sequence].from;
  const int32_t* row_position = spread.segments[of_row_position].from;
  const int32_t* block_table = spread.segments[of_block_table].from;
  for (uint32_t row = first; row < static_cast<uint32_t>(spread.values.row_count); row += gridDim.x * blockDim.x) {
    const int32_t sequence = row_sequence[row];
    const uint32_t block = static_cast<uint32_t>(row_position[row]) / spread.block_tokens;
    spread.row_block[row] = sequence < 0 ? -2 : block_table[sequences[sequence].table_begin + block];
  }
}

uint64_t table_capacity(const kvs_device_config& config) {
  const uint64_t blocks = (static_cast<uint64_t>(config.max_positions) + config.block_tokens) / config.block_tokens;
  return config.max_sequences * blocks;
}

/** Ints of the block table that any sequence reaches for. */
uint32_t table_ints(const StepInput& input, const kvs_device_config& config) {
  uint32_t end = 0;
  for (uint32_t i = 0; i < input.sequence_count; ++i) {
    const kvs_step_sequence& s = input.sequences[i];
    const uint32_t positions = static_cast<uint32_t>(input.row_position[s.row_begin] + s.row_count);
    const uint32_t blocks = (positions + config.block_tokens - 1) / config.block_tokens;
    end = std::max(end, static_cast<uint32_t>(s.table_begin) + blocks);
  }
  return end;
}

}  // namespace

StepUpload::StepUpload(const kvs_device_config& config, int urgent_priority)
    : stream_(urgent_priority), config_(config) {
  // Every array begins on 256 bytes.
  const auto padded = [](uint64_t bytes) { return (bytes + 255) / 256 * 256; };
  const uint64_t sequences = padded(config.max_sequences * sizeof(kvs_step_sequence));
  const uint64_t rows = padded(config.max_rows * sizeof(int32_t));
  table_capacity_ = table_capacity(config);
  const uint64_t table = padded(table_capacity_ * sizeof(int32_t));
  memory_ = DeviceMemory(256 + sequences + 4 * rows + table, "the step input");
  char* at = memory_.as<char>();
  const auto take = [&](uint64_t bytes) {
    char* taken = at;
    at += bytes;
    return taken;
  };
  arrays_.counts = reinterpret_cast<StepCounts*>(take(256));
  arrays_.sequences = reinterpret_cast<kvs_step_sequence*>(take(sequences));
  arrays_.row_sequence = reinterpret_cast<int32_t*>(take(rows));
  arrays_.row_position = reinterpret_cast<int32_t*>(take(rows));
  arrays_.row_block = reinterpret_cast<int32_t*>(take(rows));
  arrays_.logit_row = reinterpret_cast<int32_t*>(take(rows));
  arrays_.block_table = reinterpret_cast<int32_t*>(take(table));
}

void StepUpload::grow(Slot& slot, uint64_t bytes) {
  if (slot.memory.bytes() >= bytes) return;
  slot.released.wait();
  stream_.drain();
  slot.memory = DeviceMemory();
  slot.memory = DeviceMemory((bytes + 65535) / 65536 * 65536, "the step upload");
}

void StepUpload::begin(const int32_t* step, uint32_t bytes, const StepInput& input, cudaStream_t compute) {
  const uint32_t table = table_ints(input, config_);
  require(table <= table_capacity_, "step: a block table of %u entries, room for %llu", table,
          static_cast<unsigned long long>(table_capacity_));
  if (begun_ > 0) slots_[(begun_ - 1) % slot_count].released.record(compute);
  Slot& slot = slots_[begun_++ % slot_count];
  grow(slot, bytes);
  check_cuda(cudaStreamWaitEvent(stream_, slot.released, 0), "cudaStreamWaitEvent");
  if (bytes <= host_read_bytes_max) {
    read_host(slot.memory.as(), step, bytes, stream_);
  } else {
    check_cuda(cudaMemcpyAsync(slot.memory.as(), step, bytes, cudaMemcpyHostToDevice, stream_), "upload of the step");
  }
  slot.uploaded.record(stream_);
  check_cuda(cudaStreamWaitEvent(compute, slot.uploaded, 0), "cudaStreamWaitEvent");

  const int32_t* uploaded = slot.memory.as<const int32_t>();
  const auto segment = [&](const void* to, const void* from, uint32_t ints) {
    const int64_t offset = static_cast<const int32_t*>(from) - step;
    return Segment{static_cast<int32_t*>(const_cast<void*>(to)), uploaded + offset, ints};
  };
  const Spread spread{{segment(arrays_.sequences, input.sequences, input.sequence_count * 4),
                       segment(arrays_.row_sequence, input.row_sequence, input.row_count),
                       segment(arrays_.row_position, input.row_position, input.row_count),
                       segment(arrays_.logit_row, input.logit_row, input.logit_count),
                       segment(arrays_.block_table, input.block_table, table)},
                      const_cast<int32_t*>(arrays_.row_block),
                      config_.block_tokens,
                      const_cast<StepCounts*>(arrays_.counts),
                      {static_cast<int32_t>(input.row_count), static_cast<int32_t>(input.sequence_count),
                       static_cast<int32_t>(input.logit_count), 0}};
  spread_step<<<spread_blocks, spread_threads, 0, compute>>>(spread);
  check_launch("spread_step");
  const char* base = slot.memory.as<const char>();
  const auto moved = [&](const void* from) {
    return base + (static_cast<const char*>(from) - reinterpret_cast<const char*>(step));
  };
  arrays_.sampling = reinterpret_cast<const kvs_step_sampling*>(moved(input.sampling));
  arrays_.bias_id = reinterpret_cast<const int32_t*>(moved(input.bias_id));
  arrays_.bias_value = reinterpret_cast<const float*>(moved(input.bias_value));
}

}  // namespace kvs
