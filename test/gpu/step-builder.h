// A step's input in host memory of a device, from a list of sequences.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "side.h"

namespace check {

struct Sequence {
  int32_t slot;
  int32_t position;
  int32_t rows;
  std::vector<int32_t> table;
};

struct Step {
  std::vector<Sequence> sequences;
  /** Rows behind the sequences' that belong to nobody. */
  int32_t padding = 0;
  std::vector<int32_t> logit_rows;
  std::vector<kvs_step_sampling> sampling;  // one for each logit row, or none: all zero
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;

  int32_t rows() const {
    int32_t total = padding;
    for (const Sequence& s : sequences) total += s.rows;
    return total;
  }
};

inline kvs_step_sampling greedy(int32_t sequence) {
  kvs_step_sampling s{};
  s.sequence = sequence;
  s.top_p = 1.0f;
  s.repetition_penalty = 1.0f;
  s.top_logprobs = -1;
  s.sampled = 1;
  return s;
}

inline std::vector<int32_t> encoded(const Step& step) {
  const int32_t rows = step.rows();
  kvs_step_header header{};
  std::vector<int32_t> ints(sizeof header / 4);
  header.row_count = rows;
  header.sequence_count = static_cast<int32_t>(step.sequences.size());
  header.logit_count = static_cast<int32_t>(step.logit_rows.size());
  std::vector<int32_t> row_sequence(static_cast<size_t>(rows), -1), row_position(static_cast<size_t>(rows), 0),
      tables;
  std::vector<kvs_step_sequence> records;
  int32_t row = 0;
  for (size_t i = 0; i < step.sequences.size(); ++i) {
    const Sequence& s = step.sequences[i];
    records.push_back({s.slot, row, s.rows, static_cast<int32_t>(tables.size())});
    tables.insert(tables.end(), s.table.begin(), s.table.end());
    for (int32_t k = 0; k < s.rows; ++k, ++row) {
      row_sequence[static_cast<size_t>(row)] = static_cast<int32_t>(i);
      row_position[static_cast<size_t>(row)] = s.position + k;
    }
  }
  std::vector<kvs_step_sampling> sampling = step.sampling;
  for (size_t i = sampling.size(); i < step.logit_rows.size(); ++i) {
    sampling.push_back(greedy(row_sequence[static_cast<size_t>(step.logit_rows[i])]));
  }
  const auto append = [&](const auto& array) {
    const int32_t at = static_cast<int32_t>(ints.size());
    const size_t bytes = array.size() * sizeof(array[0]);
    ints.resize(ints.size() + bytes / 4);
    if (bytes != 0) std::memcpy(ints.data() + at, array.data(), bytes);
    return at;
  };
  header.sequences_at = append(records);
  header.row_sequence_at = append(row_sequence);
  header.row_position_at = append(row_position);
  header.logit_row_at = append(step.logit_rows);
  header.sampling_at = append(sampling);
  header.bias_id_at = append(step.bias_ids);
  header.bias_value_at = append(step.bias_values);
  header.block_table_at = append(tables);
  ints.push_back(0);
  std::memcpy(ints.data(), &header, sizeof header);
  return ints;
}

/** Keeps the step's memory until it goes out of scope, by when the device must be done with it. */
class BegunStep {
 public:
  BegunStep(Side& side, const Step& step) : side_(side) {
    const std::vector<int32_t> ints = encoded(step);
    side.lib.ok(side.lib.alloc_host(side.device, ints.size() * 4, &address_));
    std::memcpy(reinterpret_cast<void*>(address_), ints.data(), ints.size() * 4);
    bytes_ = static_cast<uint32_t>(ints.size() * 4);
    begin();
  }
  void begin() {
    side_.lib.ok(side_.lib.begin_step(side_.device, reinterpret_cast<const int32_t*>(address_), bytes_));
  }
  ~BegunStep() {
    // Waits for the streams; an error shows in the next call.
    side_.lib.free_host(side_.device, address_);
  }
  BegunStep(const BegunStep&) = delete;
  BegunStep& operator=(const BegunStep&) = delete;

 private:
  Side& side_;
  uint64_t address_ = 0;
  uint32_t bytes_ = 0;
};

}  // namespace check
