// How a weight matrix lies in memory: panels of 32 outputs, each [col][32] in the weight's dtype. A matrix product
// runs lanes over outputs and sums over cols in order, so it reads every panel from front to back. Outputs past the
// last row are zeros. In bf16, outputs i and i + 16 of a panel are neighbours: as the halves of a 32-bit word they
// become floats by a shift and a mask, without moving between lanes.

#pragma once

#include <cstdint>

#include "../common/step-input.h"

namespace kvs {

constexpr uint32_t panel_rows = 32;

/** Where output `row` of a panel lies among the 32. */
__attribute__((always_inline)) inline uint32_t place_in_panel(uint32_t row, kvs_dtype dtype) {
  return dtype == KVS_BF16 ? row % 16 * 2 + row / 16 : row;
}

struct WeightView {
  const char* data;
  uint32_t rows;
  uint32_t cols;
  kvs_dtype dtype;

  // Inlined everywhere: see scratch.h.
  __attribute__((always_inline)) uint32_t panel_count() const { return (rows + panel_rows - 1) / panel_rows; }
  __attribute__((always_inline)) uint64_t panel_bytes() const {
    return static_cast<uint64_t>(cols) * panel_rows * (dtype == KVS_F32 ? 4 : 2);
  }
  __attribute__((always_inline)) const char* panel(uint32_t index) const { return data + index * panel_bytes(); }
};

}  // namespace kvs
