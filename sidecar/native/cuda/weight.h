// A weight matrix in device memory: row-major as in the checkpoint, which is what the products want. Rows of F8E4M3
// are permuted: see fp8-order.h.

#pragma once

#include "../common/step-input.h"
#include "device-memory.h"
#include "fp8-order.h"

struct kvs_weight {
  kvs_weight(uint32_t rows, uint32_t cols, kvs_dtype dtype)
      : rows(rows), cols(cols), dtype(dtype), memory(bytes(), "a weight matrix") {
    if (dtype == KVS_F8E4M3) scales = kvs::DeviceMemory(static_cast<uint64_t>(rows) * sizeof(float), "weight scales");
  }

  uint64_t row_bytes() const {
    return dtype == KVS_F8E4M3 ? kvs::fp8_row_bytes(cols) : static_cast<uint64_t>(cols) * kvs::dtype_bytes(dtype);
  }
  uint64_t bytes() const { return rows * row_bytes(); }

  const uint32_t rows;
  const uint32_t cols;
  const kvs_dtype dtype;
  kvs::DeviceMemory memory;
  kvs::DeviceMemory scales;      // (rows) F32; F8E4M3 only: value = scale * stored
  bool is_scaled_after = false;  // F8E4M3 only: the library's product knows no such scales, see Matmuls::prepare
};
