// y = x weight^T: lanes over outputs, one chain of multiply-adds over the inputs for every output, in order, whatever
// the number of rows. Weights are widened in registers: with six rows and more that costs less than a tenth. A few
// rows stream whole panels; more rows are cut into blocks that stay in the caches, and continue the same chains.

constexpr uint32_t accumulators_max = W == 16 ? 24 : 12;  // of 32 or 16 registers
constexpr uint32_t panel_vecs = panel_rows / W;
constexpr uint32_t tile_vecs = 2;
constexpr uint32_t tile_rows = accumulators_max / tile_vecs;
constexpr uint32_t tile_outputs = tile_vecs * W;
// A stretch of a panel and tile_rows rows of x lie in L1 together, a block of rows in L2.
constexpr uint32_t depth_max = 256;
constexpr uint32_t x_stride = depth_max + 16;  // rows a multiple of 4096 bytes apart would share cache sets
constexpr uint32_t block_rows_max = 240;
constexpr uint32_t group_panels_max = 8;
constexpr uint32_t partial_stride = group_panels_max * panel_rows;
// Whole panels for up to so many rows: their accumulators, two weights and one x must fit the registers.
constexpr uint32_t stream_rows_max = W == 16 ? 4 : 2;
constexpr uint32_t prefetch_depth = 64;

constexpr uint64_t matmul_scratch_bytes = 4ull * block_rows_max * (x_stride + partial_stride) + 128;

/** How the weights of a panel come two vectors at a time, and which outputs they are: see weight-layout.h. */
struct PlainPanel {
  static constexpr bool is_paired = false;
  static uint32_t output_of(uint32_t vec) { return vec * W; }
};
struct F32Panel : PlainPanel, F32 {
  static void load_two(const float* p, Vec& a, Vec& b) {
    a = Vec::load(p);
    b = Vec::load(p + W);
  }
};
struct F16Panel : PlainPanel, F16 {
  static void load_two(const uint16_t* p, Vec& a, Vec& b) {
    a = Vec::load_f16(p);
    b = Vec::load_f16(p + W);
  }
};
struct BF16Panel : BF16 {
  static constexpr bool is_paired = true;
  static void load_two(const uint16_t* p, Vec& a, Vec& b) { Vec::load_bf16_pairs(p, a, b); }
  static uint32_t output_of(uint32_t vec) { return vec / 2 * W + vec % 2 * (panel_rows / 2); }
};

/** Memory to fetch ahead, into cache `Level`: each k of a product asks for `Lines` lines, `step` bytes further. */
template <uint32_t Lines, uint32_t Level>
struct Ahead {
  const char* at;
  uint64_t step;
  __attribute__((always_inline)) void fetch(uint32_t k) const {
#pragma GCC unroll 4
    for (uint32_t line = 0; line < Lines; ++line) __builtin_prefetch(at + k * step + line * 64, 0, 4 - Level);
  }
};

/** acc[r][p][v] += x[r][k] * w[p][k][v] for k in order; w[p] has `w_stride` elements a k. */
template <class Panel, uint32_t Rows, uint32_t Parts, uint32_t Vecs, uint32_t Lines, uint32_t Level>
inline __attribute__((always_inline)) void accumulate(Vec (&acc)[Rows][Parts][Vecs], const float* x, uint64_t x_stride,
                                                      const typename Panel::Stored* const (&w)[Parts],
                                                      uint64_t w_stride, uint32_t depth,
                                                      const Ahead<Lines, Level> (&ahead)[Parts]) {
  static_assert(Vecs % 2 == 0);
  for (uint32_t k = 0; k < depth; ++k) {
#pragma GCC unroll 32
    for (uint32_t p = 0; p < Parts; ++p) {
      ahead[p].fetch(k);
#pragma GCC unroll 32
      for (uint32_t v = 0; v < Vecs; v += 2) {
        Vec a, b;
        Panel::load_two(w[p] + k * w_stride + v * W, a, b);
#pragma GCC unroll 32
        for (uint32_t r = 0; r < Rows; ++r) {
          const Vec value = Vec::set(x[r * x_stride + k]);
          acc[r][p][v] = Vec::fma(value, a, acc[r][p][v]);
          acc[r][p][v + 1] = Vec::fma(value, b, acc[r][p][v + 1]);
        }
      }
    }
  }
}

/** body(r, p, v) for every accumulator, unrolled: they must stay in registers. */
template <uint32_t Rows, uint32_t Parts, uint32_t Vecs, class Body>
inline __attribute__((always_inline)) void for_accumulators(const Body& body) {
#pragma GCC unroll 32
  for (uint32_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 32
    for (uint32_t p = 0; p < Parts; ++p) {
#pragma GCC unroll 32
      for (uint32_t v = 0; v < Vecs; ++v) body(r, p, v);
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

constexpr uint32_t quotient_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

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

/** All rows of x against `Parts` neighbouring panels. */
template <class Panel, uint32_t Rows, uint32_t Parts>
inline void stream_panels(const MatmulTask& task, uint32_t panel) {
  using Stored = typename Panel::Stored;
  constexpr uint64_t row_bytes = panel_rows * sizeof(Stored);
  const Stored* w[Parts];
  Ahead<row_bytes / 64, 1> ahead[Parts];  // into L1: its latency is what a lone row waits for
#pragma GCC unroll 8
  for (uint32_t p = 0; p < Parts; ++p) {
    w[p] = reinterpret_cast<const Stored*>(task.weight.panel(panel + p));
    ahead[p] = {reinterpret_cast<const char*>(w[p]) + prefetch_depth * row_bytes, row_bytes};
  }
  Vec acc[Rows][Parts][panel_vecs];
  for_accumulators<Rows, Parts, panel_vecs>([&](uint32_t r, uint32_t p, uint32_t v) { acc[r][p][v] = Vec::zero(); });
  accumulate<Panel>(acc, task.x, task.weight.cols, w, panel_rows, task.weight.cols, ahead);
  for_accumulators<Rows, Parts, panel_vecs>([&](uint32_t r, uint32_t p, uint32_t v) {
    finish(task, r, (panel + p) * panel_rows + Panel::output_of(v), acc[r][p][v]);
  });
}

template <class Panel, uint32_t Rows>
void stream_range(const MatmulTask& task, uint32_t begin, uint32_t end) {
  // Eight chains at least, so that the latency of one is hidden behind the others.
  constexpr uint32_t parts = max_of(1, 8 / (Rows * panel_vecs));
  uint32_t panel = begin;
  for (; panel + parts <= end; panel += parts) stream_panels<Panel, Rows, parts>(task, panel);
  for (; panel < end; ++panel) stream_panels<Panel, Rows, 1>(task, panel);
}

// ---- more rows

/** Where an item of the product works. */
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

/** The stretch of one panel, for the tiles of a block. */
template <class Panel>
struct PanelStretch {
  const typename Panel::Stored* weights;
  uint32_t output;      // its first
  const float* x;       // (rows, x_stride)
  float* partial;       // (rows, partial_stride): sums so far, this panel's columns
  const char* next;     // memory that comes after this stretch
  uint64_t next_bytes;
};

/** Rows [row, row + Rows) of the block against vectors [vec, vec + tile_vecs). */
template <class Panel, uint32_t Rows>
inline void multiply_tile(const MatmulTask& task, const MatmulBlock& block, const Depth& depth,
                          const PanelStretch<Panel>& stretch, uint32_t row, uint32_t vec, const Ahead<1, 2>& ahead) {
  float* partial = stretch.partial + static_cast<uint64_t>(row) * partial_stride + vec * W;
  Vec acc[Rows][1][tile_vecs];
  for_accumulators<Rows, 1, tile_vecs>([&](uint32_t r, uint32_t p, uint32_t v) {
    acc[r][p][v] = depth.is_first ? Vec::zero() : Vec::load(partial + r * partial_stride + v * W);
  });
  const typename Panel::Stored* const w[1] = {stretch.weights + vec * W};
  const float* x = stretch.x + static_cast<uint64_t>(row) * x_stride;
  accumulate<Panel>(acc, x, x_stride, w, panel_rows, depth.count, {ahead});
  for_accumulators<Rows, 1, tile_vecs>([&](uint32_t r, uint32_t p, uint32_t v) {
    if (depth.is_last) {
      finish(task, block.row_begin + row + r, stretch.output + Panel::output_of(vec + v), acc[r][p][v]);
    } else {
      acc[r][p][v].store(partial + r * partial_stride + v * W);
    }
  });
}

/** All tiles of a block against one stretch. Each fetches its share of the next stretch meanwhile. */
template <class Panel>
void multiply_stretch(const MatmulTask& task, const MatmulBlock& block, const Depth& depth,
                      const PanelStretch<Panel>& stretch) {
  const uint32_t rows = block.row_end - block.row_begin;
  const uint32_t row_tiles = quotient_up(rows, tile_rows);
  const uint32_t even_rows = quotient_up(rows, row_tiles);  // a tile of one row has too few chains
  const uint32_t fetches = row_tiles * (panel_vecs / tile_vecs) * depth.count;
  const uint64_t step = quotient_up(static_cast<uint32_t>(stretch.next_bytes), fetches);
  Ahead<1, 2> ahead{stretch.next, step};
  for (uint32_t vec = 0; vec < panel_vecs; vec += tile_vecs) {
    for (uint32_t row = 0; row < rows; row += even_rows, ahead.at += step * depth.count) {
      with_count<tile_rows>(min_of(even_rows, rows - row), [&](auto count) {
        multiply_tile<Panel, decltype(count)::value>(task, block, depth, stretch, row, vec, ahead);
      });
    }
  }
}

template <class Panel>
void multiply_block(const MatmulTask& task, const MatmulBlock& block, Scratch& scratch) {
  using Stored = typename Panel::Stored;
  const uint32_t cols = task.weight.cols;
  const uint32_t rows = block.row_end - block.row_begin;
  float* x = scratch.take<float>(block_rows_max * x_stride);
  float* partial = scratch.take<float>(block_rows_max * partial_stride);
  const auto weights_at = [&](uint32_t panel, uint32_t col) {
    return reinterpret_cast<const Stored*>(task.weight.panel(panel)) + static_cast<uint64_t>(col) * panel_rows;
  };
  for (uint32_t begin = 0; begin < cols; begin += depth_max) {
    const uint32_t count = min_of(depth_max, cols - begin);
    const Depth depth{begin, count, begin == 0, begin + count == cols};
    for (uint32_t r = 0; r < rows; ++r) {
      __builtin_memcpy(x + r * x_stride, task.x + static_cast<uint64_t>(block.row_begin + r) * cols + begin,
                       count * sizeof(float));
    }
    for (uint32_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
      const bool is_last_panel = panel + 1 == block.panel_end;
      const Stored* next = is_last_panel ? weights_at(block.panel_begin, begin + count) : weights_at(panel + 1, begin);
      multiply_stretch<Panel>(task, block, depth,
                              {weights_at(panel, begin), panel * panel_rows, x,
                               partial + (panel - block.panel_begin) * panel_rows,
                               reinterpret_cast<const char*>(next), count * panel_rows * sizeof(Stored)});
    }
  }
}

// ---- the operation

/** How a product is cut into items: blocks of rows times groups of panels, as even as whole pairs allow. */
struct MatmulPlan {
  uint32_t row_blocks;
  uint32_t block_rows;
  uint32_t groups;
};

inline MatmulPlan plan_matmul(const MatmulTask& task) {
  const uint32_t panels = task.weight.panel_count();
  const uint32_t pairs = quotient_up(panels, 2);
  if (task.row_count <= stream_rows_max) {
    // Large matrices in more items, so that a disturbed core may take fewer.
    const uint64_t item_bytes = 256 << 10;
    const uint64_t rounds = panels * task.weight.panel_bytes() / (item_bytes * task.thread_count);
    return {1, task.row_count, min_of(pairs, task.thread_count * max_of(1, min_of(8, static_cast<uint32_t>(rounds))))};
  }
  const uint32_t row_blocks = quotient_up(task.row_count, block_rows_max);
  const uint32_t block_rows = quotient_up(quotient_up(task.row_count, row_blocks), tile_rows) * tile_rows;
  const uint32_t for_threads = quotient_up(4 * task.thread_count, row_blocks);
  const uint32_t for_scratch = quotient_up(pairs, group_panels_max / 2);
  return {quotient_up(task.row_count, block_rows), block_rows, min_of(pairs, max_of(for_threads, for_scratch))};
}

uint32_t matmul_items(const MatmulTask& task) {
  const MatmulPlan plan = plan_matmul(task);
  return plan.row_blocks * plan.groups;
}

void matmul(const MatmulTask& task, uint32_t item, Scratch& scratch) {
  const MatmulPlan plan = plan_matmul(task);
  const uint32_t row_begin = item / plan.groups * plan.block_rows;
  const uint64_t group = item % plan.groups;
  const uint64_t pairs = quotient_up(task.weight.panel_count(), 2);
  const uint32_t panel_begin = static_cast<uint32_t>(group * pairs / plan.groups * 2);
  const uint32_t panel_end = static_cast<uint32_t>((group + 1) * pairs / plan.groups * 2);
  const MatmulBlock block{row_begin, min_of(task.row_count, row_begin + plan.block_rows), panel_begin,
                          min_of(task.weight.panel_count(), panel_end)};
  const auto multiply = [&](auto type) {
    using Panel = decltype(type);
    if (task.row_count > stream_rows_max) return multiply_block<Panel>(task, block, scratch);
    with_count<stream_rows_max>(task.row_count, [&](auto rows) {
      stream_range<Panel, decltype(rows)::value>(task, block.panel_begin, block.panel_end);
    });
  };
  switch (task.weight.dtype) {
    case KVS_F32: return multiply(F32Panel{});
    case KVS_F16: return multiply(F16Panel{});
    default: return multiply(BF16Panel{});
  }
}
