// y = x weight^T: lanes over outputs, one chain of multiply-adds over the inputs for every output, in order, whatever
// the number of rows. Few rows stream the weights through registers; many rows are cut into tiles that stay in the
// caches, with weights widened to f32 once for all rows of a block. Both continue the same chains: the bits agree.

constexpr uint32_t accumulators_max = W == 16 ? 24 : 12;  // of 32 or 16 registers
constexpr uint32_t panel_vecs = panel_rows / W;
constexpr uint32_t tile_vecs = 2;
constexpr uint32_t tile_rows = accumulators_max / tile_vecs;
constexpr uint32_t tile_outputs = tile_vecs * W;
// A tile of weights, (depth, tile_outputs) f32, and tile_rows rows of x lie in L1 together.
constexpr uint32_t depth_max = W == 16 ? 192 : 256;
constexpr uint32_t x_tile_stride = depth_max + 16;  // rows a multiple of 4096 bytes apart would share cache sets
constexpr uint32_t block_rows_max = 240;            // of x: (block_rows_max, depth_max) f32 lie in L2
constexpr uint32_t group_panels_max = 8;
constexpr uint32_t direct_rows_max = 3 * tile_rows;  // up to here widening in registers is cheaper than a tile

constexpr uint32_t partial_stride = group_panels_max * panel_rows;

constexpr uint64_t matmul_scratch_bytes =
    4ull * (block_rows_max * (x_tile_stride + partial_stride) + depth_max * tile_outputs) + 256;

/** acc[r][p][v] += x[r][k] * w[p][k][v] for k in order; w[p] has `w_stride` elements a k. */
template <class Type, uint32_t Rows, uint32_t Parts, uint32_t Vecs>
inline __attribute__((always_inline)) void accumulate(Vec (&acc)[Rows][Parts][Vecs], const float* x, uint64_t x_stride,
                                                      const typename Type::Stored* const (&w)[Parts],
                                                      uint64_t w_stride, uint32_t depth) {
  for (uint32_t k = 0; k < depth; ++k) {
    Vec weights[Parts][Vecs];
#pragma GCC unroll 32
    for (uint32_t p = 0; p < Parts; ++p) {
#pragma GCC unroll 32
      for (uint32_t v = 0; v < Vecs; ++v) weights[p][v] = Type::load(w[p] + k * w_stride + v * W);
    }
#pragma GCC unroll 32
    for (uint32_t r = 0; r < Rows; ++r) {
      const Vec value = Vec::set(x[r * x_stride + k]);
#pragma GCC unroll 32
      for (uint32_t p = 0; p < Parts; ++p) {
#pragma GCC unroll 32
        for (uint32_t v = 0; v < Vecs; ++v) acc[r][p][v] = Vec::fma(value, weights[p][v], acc[r][p][v]);
      }
    }
  }
}

/** y[row][output ...] = sum + bias, or += that. */
inline void finish(const MatmulTask& task, uint32_t row, uint32_t output, Vec sum) {
  if (output >= task.weight.rows) return;
  const uint32_t n = min_of(W, task.weight.rows - output);
  float* y = task.y + static_cast<uint64_t>(row) * task.weight.rows + output;
  if (task.bias != nullptr) sum = sum + F32::load(task.bias + output, n);
  if (task.is_accumulating) sum = F32::load(y, n) + sum;
  F32::store(y, n, sum);
}

/** body(Count<n>) with n = value, 1 to Max. */
template <uint32_t N>
struct Count {
  static constexpr uint32_t value = N;
};
template <uint32_t Max, class Body>
inline void with_count(uint32_t value, const Body& body) {
  if constexpr (Max > 1) {
    if (value < Max) return with_count<Max - 1>(value, body);
  }
  body(Count<Max>{});
}

// ---- few rows

/** Rows of x against `Parts` neighbouring panels, `Vecs` vectors of each at a time. */
template <class Type, uint32_t Rows, uint32_t Parts, uint32_t Vecs>
inline void stream_panels(const MatmulTask& task, uint32_t panel) {
  using Stored = typename Type::Stored;
  for (uint32_t at = 0; at < panel_rows; at += Vecs * W) {
    const Stored* w[Parts];
    for (uint32_t p = 0; p < Parts; ++p) w[p] = reinterpret_cast<const Stored*>(task.weight.panel(panel + p)) + at;
    Vec acc[Rows][Parts][Vecs];
    for (auto& row : acc) {
      for (auto& part : row) {
        for (Vec& vec : part) vec = Vec::zero();
      }
    }
    accumulate<Type, Rows, Parts, Vecs>(acc, task.x, task.weight.cols, w, panel_rows, task.weight.cols);
    for (uint32_t r = 0; r < Rows; ++r) {
      for (uint32_t p = 0; p < Parts; ++p) {
        for (uint32_t v = 0; v < Vecs; ++v) finish(task, r, (panel + p) * panel_rows + at + v * W, acc[r][p][v]);
      }
    }
  }
}

template <class Type, uint32_t Rows>
void stream_range(const MatmulTask& task, uint32_t begin, uint32_t end) {
  constexpr uint32_t vecs = Rows * panel_vecs <= accumulators_max ? panel_vecs : tile_vecs;
  // At least eight chains, so that the latency of one is hidden behind the others.
  constexpr uint32_t parts = max_of(1, (8 + Rows * vecs - 1) / (Rows * vecs));
  constexpr uint32_t parts_that_fit = vecs < panel_vecs ? 1 : parts;
  uint32_t panel = begin;
  for (; panel + parts_that_fit <= end; panel += parts_that_fit) {
    stream_panels<Type, Rows, parts_that_fit, vecs>(task, panel);
  }
  for (; panel < end; ++panel) stream_panels<Type, Rows, 1, vecs>(task, panel);
}

// ---- many rows

/** Where an item of a product with many rows works. */
struct MatmulBlock {
  uint32_t row_begin;
  uint32_t row_end;
  uint32_t panel_begin;
  uint32_t panel_end;
};

/** A stretch of the inputs. */
struct Depth {
  uint32_t begin;
  uint32_t count;
  bool is_first;
  bool is_last;
};

template <class Type, uint32_t Rows>
inline void multiply_tile(const MatmulTask& task, const Depth& depth, const float* x, float* partial, uint32_t row,
                          uint32_t output, const typename Type::Stored* weights, uint64_t w_stride) {
  Vec acc[Rows][1][tile_vecs];
  for (uint32_t r = 0; r < Rows; ++r) {
    for (uint32_t v = 0; v < tile_vecs; ++v) {
      acc[r][0][v] = depth.is_first ? Vec::zero() : Vec::load(partial + r * partial_stride + v * W);
    }
  }
  const typename Type::Stored* const w[1] = {weights};
  accumulate<Type, Rows, 1, tile_vecs>(acc, x, x_tile_stride, w, w_stride, depth.count);
  for (uint32_t r = 0; r < Rows; ++r) {
    for (uint32_t v = 0; v < tile_vecs; ++v) {
      if (depth.is_last) {
        finish(task, row + r, output + v * W, acc[r][0][v]);
      } else {
        acc[r][0][v].store(partial + r * partial_stride + v * W);
      }
    }
  }
}

template <class Type>
void multiply_rows(const MatmulTask& task, const MatmulBlock& block, const Depth& depth, const float* x, float* partial,
                   uint32_t output, const typename Type::Stored* weights, uint64_t w_stride) {
  const uint32_t column = output - block.panel_begin * panel_rows;
  for (uint32_t row = block.row_begin; row < block.row_end; row += tile_rows) {
    const uint64_t at = row - block.row_begin;
    with_count<tile_rows>(min_of(tile_rows, block.row_end - row), [&](auto rows) {
      multiply_tile<Type, decltype(rows)::value>(task, depth, x + at * x_tile_stride,
                                                 partial + at * partial_stride + column, row, output, weights,
                                                 w_stride);
    });
  }
}

template <class Type>
void multiply_block(const MatmulTask& task, const MatmulBlock& block, Scratch& scratch) {
  using Stored = typename Type::Stored;
  const uint32_t cols = task.weight.cols;
  const uint32_t rows = block.row_end - block.row_begin;
  float* x = scratch.take<float>(block_rows_max * x_tile_stride);
  float* partial = scratch.take<float>(block_rows_max * partial_stride);
  float* tile = scratch.take<float>(depth_max * tile_outputs);
  for (uint32_t begin = 0; begin < cols; begin += depth_max) {
    const uint32_t count = min_of(depth_max, cols - begin);
    const Depth depth{begin, count, begin == 0, begin + count == cols};
    for (uint32_t r = 0; r < rows; ++r) {
      __builtin_memcpy(x + r * x_tile_stride, task.x + static_cast<uint64_t>(block.row_begin + r) * cols + begin,
                       count * sizeof(float));
    }
    for (uint32_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
      for (uint32_t at = 0; at < panel_rows; at += tile_outputs) {
        const uint32_t output = panel * panel_rows + at;
        const Stored* weights = reinterpret_cast<const Stored*>(task.weight.panel(panel)) + begin * panel_rows + at;
        if (rows <= direct_rows_max) {
          multiply_rows<Type>(task, block, depth, x, partial, output, weights, panel_rows);
          continue;
        }
        for (uint32_t k = 0; k < count; ++k) {
          for (uint32_t v = 0; v < tile_vecs; ++v) {
            Type::load(weights + k * panel_rows + v * W).store(tile + k * tile_outputs + v * W);
          }
        }
        multiply_rows<F32>(task, block, depth, x, partial, output, tile, tile_outputs);
      }
    }
  }
}

// ---- the operation

/** How a product is cut into items. */
struct MatmulPlan {
  uint32_t row_blocks;
  uint32_t block_rows;
  uint32_t groups;
  uint32_t group_panels;
};

inline uint32_t quotient_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

inline MatmulPlan plan_matmul(const MatmulTask& task) {
  const uint32_t panels = task.weight.panel_count();
  if (task.row_count <= tile_rows) {
    // Large matrices in many items, so that a disturbed core may take fewer.
    const uint64_t item_bytes = 128 << 10;
    const uint64_t bytes = panels * task.weight.panel_bytes();
    const uint32_t rounds = max_of(1, static_cast<uint32_t>(bytes / item_bytes) / task.thread_count);
    const uint32_t group = max_of(1, quotient_up(panels, task.thread_count * min_of(rounds, 16)));
    return {1, task.row_count, quotient_up(panels, group), group};
  }
  const uint32_t row_blocks = quotient_up(task.row_count, block_rows_max);
  const uint32_t block_rows = quotient_up(quotient_up(task.row_count, row_blocks), tile_rows) * tile_rows;
  const uint32_t wanted_groups = quotient_up(4 * task.thread_count, row_blocks);
  const uint32_t group = max_of(1, min_of(group_panels_max, panels / wanted_groups));
  return {quotient_up(task.row_count, block_rows), block_rows, quotient_up(panels, group), group};
}

uint32_t matmul_items(const MatmulTask& task) {
  const MatmulPlan plan = plan_matmul(task);
  return plan.row_blocks * plan.groups;
}

void matmul(const MatmulTask& task, uint32_t item, Scratch& scratch) {
  const MatmulPlan plan = plan_matmul(task);
  const uint32_t row_begin = item / plan.groups * plan.block_rows;
  const uint32_t panel_begin = item % plan.groups * plan.group_panels;
  const MatmulBlock block{row_begin, min_of(task.row_count, row_begin + plan.block_rows), panel_begin,
                          min_of(task.weight.panel_count(), panel_begin + plan.group_panels)};
  with_dtype(task.weight.dtype, [&](auto type) {
    using Type = decltype(type);
    if (task.row_count > tile_rows) return multiply_block<Type>(task, block, scratch);
    with_count<tile_rows>(task.row_count, [&](auto rows) {
      stream_range<Type, decltype(rows)::value>(task, block.panel_begin, block.panel_end);
    });
  });
}
