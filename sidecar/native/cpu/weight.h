// A weight matrix of one device: its memory in panels, and how rows get into it.

#pragma once

#include "thread-pool.h"
#include "weight-layout.h"
#include "weight-memory.h"

struct kvs_weight {
  kvs_weight(kvs::WeightMemory& memory, uint32_t rows, uint32_t cols, kvs_dtype dtype);

  kvs::WeightView view() const { return {piece.data, rows, cols, dtype}; }
  /** source: (row_count, cols) of source_dtype. */
  void upload(kvs::ThreadPool& pool, uint32_t row_begin, uint32_t row_count, const void* source,
              kvs_dtype source_dtype);
  void fill_random(kvs::ThreadPool& pool, uint64_t seed, float deviation);

  const uint32_t rows;
  const uint32_t cols;
  const kvs_dtype dtype;
  const kvs::WeightPiece piece;
};
