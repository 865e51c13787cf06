// Packing into panels, a panel an item, so that rows may arrive in any order and number.

#include "weight.h"

#include <algorithm>

#include "../common/random.h"
#include "half.h"

namespace {

uint64_t packed_bytes(uint32_t rows, uint32_t cols, kvs_dtype dtype) {
  const kvs::WeightView view{nullptr, rows, cols, dtype};
  return view.panel_count() * view.panel_bytes();
}

/** Calls body(first row, end row) for every panel that [begin, end) touches. */
template <class Body>
void for_each_panel(kvs::ThreadPool& pool, uint32_t begin, uint32_t end, const Body& body) {
  const uint32_t first = begin / kvs::panel_rows;
  const uint32_t count = (end - 1) / kvs::panel_rows + 1 - first;
  pool.run(count, [&](uint32_t item, kvs::Scratch&) {
    const uint32_t panel_begin = (first + item) * kvs::panel_rows;
    body(std::max(begin, panel_begin), std::min(end, panel_begin + kvs::panel_rows));
  });
}

/** Rows [begin, end) of one panel; element(row, col) gives the stored type's bits. */
template <class Stored, class Element>
void pack_panel(const kvs_weight& weight, uint32_t begin, uint32_t end, const Element& element) {
  const uint32_t panel_begin = begin / kvs::panel_rows * kvs::panel_rows;
  Stored* panel = reinterpret_cast<Stored*>(weight.piece.data) + static_cast<uint64_t>(panel_begin) * weight.cols;
  // By squares: rows lie powers of two apart, so that a column of them would want one set of the cache.
  for (uint32_t tile = 0; tile < weight.cols; tile += kvs::panel_rows) {
    const uint32_t tile_end = std::min(tile + kvs::panel_rows, weight.cols);
    for (uint32_t row = begin; row < end; ++row) {
      Stored* at = panel + kvs::place_in_panel(row - panel_begin, weight.dtype);
      for (uint32_t col = tile; col < tile_end; ++col) at[col * kvs::panel_rows] = element(row, col);
    }
  }
}

}  // namespace

kvs_weight::kvs_weight(kvs::WeightMemory& memory, uint32_t rows, uint32_t cols, kvs_dtype dtype)
    : rows(rows), cols(cols), dtype(dtype), piece(memory.take(packed_bytes(rows, cols, dtype))) {}

void kvs_weight::upload(kvs::ThreadPool& pool, uint32_t row_begin, uint32_t row_count, const void* source,
                        kvs_dtype source_dtype) {
  for_each_panel(pool, row_begin, row_begin + row_count, [&](uint32_t begin, uint32_t end) {
    const auto index = [&](uint32_t row, uint32_t col) { return static_cast<uint64_t>(row - row_begin) * cols + col; };
    if (source_dtype == dtype && dtype == KVS_F32) {
      const float* values = static_cast<const float*>(source);
      pack_panel<float>(*this, begin, end, [&](uint32_t row, uint32_t col) { return values[index(row, col)]; });
    } else if (source_dtype == dtype) {
      const uint16_t* values = static_cast<const uint16_t*>(source);
      pack_panel<uint16_t>(*this, begin, end, [&](uint32_t row, uint32_t col) { return values[index(row, col)]; });
    } else if (dtype == KVS_F32) {
      pack_panel<float>(*this, begin, end, [&](uint32_t row, uint32_t col) {
        return kvs::load_element(source, index(row, col), source_dtype);
      });
    } else {
      pack_panel<uint16_t>(*this, begin, end, [&](uint32_t row, uint32_t col) {
        const float value = kvs::load_element(source, index(row, col), source_dtype);
        return dtype == KVS_F16 ? kvs::f16_of_float(value) : kvs::bf16_of_float(value);
      });
    }
  });
}

void kvs_weight::fill_random(kvs::ThreadPool& pool, uint64_t seed, float deviation) {
  const float scale = kvs::random_weight_scale(deviation);
  for_each_panel(pool, 0, rows, [&](uint32_t begin, uint32_t end) {
    const auto value = [&](uint32_t row, uint32_t col) {
      return kvs::random_weight(seed, static_cast<uint64_t>(row) * cols + col, scale);
    };
    if (dtype == KVS_F32) {
      pack_panel<float>(*this, begin, end, value);
    } else if (dtype == KVS_F16) {
      pack_panel<uint16_t>(*this, begin, end, [&](uint32_t r, uint32_t c) { return kvs::f16_of_float(value(r, c)); });
    } else {
      pack_panel<uint16_t>(*this, begin, end, [&](uint32_t r, uint32_t c) { return kvs::bf16_of_float(value(r, c)); });
    }
  });
}
