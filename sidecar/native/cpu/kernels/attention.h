// y = softmax(scale q . k) v over a paged view. Key tiles are the blocks of the view, in order, with an online softmax
// from tile to tile (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
// FlashAttention, 2022). An item is some rows of the step and the query heads of one key-value head, which share every
// tile of keys that is turned, and read the values as they lie. A row's sums run in one order, over its own keys
// alone, whoever shares its item.

constexpr uint32_t query_rows = 6;         // queries at a time
constexpr uint32_t item_queries_max = 96;  // rows times query heads: what turning a tile is spread over

inline uint32_t round_up(uint32_t a, uint32_t multiple) { return (a + multiple - 1) / multiple * multiple; }

/** Rows of one sequence against one key-value head, for query heads [head_begin, head_end). */
struct AttentionPiece {
  uint32_t sequence;
  uint32_t row_begin;
  uint32_t row_end;
  uint32_t kv_head;
  uint32_t head_begin;
  uint32_t head_end;
};

/** A thread's tiles and running state. Query i is head i % heads of row i / heads. */
struct AttentionState {
  uint32_t key_stride;  // of keys and scores: the tile's keys, rounded up to whole vectors
  uint32_t dim_stride;
  float* keys;     // (head_dim, key_stride): transposed
  float* queries;  // (query_rows, dim_stride): turned against the tile's base
  float* scores;   // (query_rows, key_stride)
  float* outputs;  // (queries, dim_stride): in the order that values load in, not yet divided by the sum
  float* maxima;   // (queries)
  float* sums;     // (queries)
};

constexpr Ahead<0, 1> nothing_ahead[1] = {{nullptr, 0}};

/** A query's keys of the tile: [begin, end). */
struct KeyRange {
  uint32_t begin;
  uint32_t end;
  bool is_empty() const { return begin >= end; }
};

inline KeyRange keys_of(uint32_t position, uint32_t window, uint32_t base, uint32_t block_tokens) {
  const uint32_t first = window == 0 || position < window ? 0 : position - window + 1;
  const uint32_t end = position + 1 <= base ? 0 : min_of(block_tokens, position + 1 - base);
  return {first <= base ? 0 : first - base, end};
}

inline AttentionState make_state(const kvs_device_config& config, uint32_t queries, Scratch& scratch) {
  AttentionState state;
  state.key_stride = round_up(config.block_tokens, tile_outputs);
  state.dim_stride = round_up(config.head_dim, tile_outputs);
  state.keys = scratch.take<float>(config.head_dim * state.key_stride);
  state.queries = scratch.take<float>(query_rows * state.dim_stride);
  state.scores = scratch.take<float>(query_rows * state.key_stride);
  state.outputs = scratch.take<float>(queries * state.dim_stride);
  state.maxima = scratch.take<float>(queries);
  state.sums = scratch.take<float>(queries);
  return state;
}

uint64_t attention_scratch_bytes(const kvs_device_config& config) {
  const uint64_t key_stride = round_up(config.block_tokens, tile_outputs);
  const uint64_t dim_stride = round_up(config.head_dim, tile_outputs);
  const uint64_t queries = max_of(item_queries_max, config.heads / config.kv_heads);
  const uint64_t floats =
      config.head_dim * key_stride + query_rows * (dim_stride + key_stride) + queries * (dim_stride + 2);
  return 4 * floats + 1024;
}

/** Turns the keys up to `end`, a multiple of eight; those behind it in the block may be anything. */
template <class Type>
void load_keys(const AttentionState& state, const kvs_device_config& config, const typename Type::Stored* keys,
               uint32_t end) {
  for (uint32_t t = 0; t < end; t += turned_rows) {
    turn_rows<Type>(state.keys + t, state.key_stride, keys + static_cast<uint64_t>(t) * config.head_dim,
                    config.head_dim, config.head_dim);
  }
}

/** Vectors at a time: many for few queries, so that there are enough chains. */
template <uint32_t Rows>
constexpr uint32_t wide_vecs = W == 16 ? 4 : Rows == 1 ? 8 : Rows == 2 ? 4 : tile_vecs;

/** scores (Rows, keys [t, t + Vecs W)) = queries . keys. */
template <uint32_t Rows, uint32_t Vecs>
inline void score_keys(const AttentionState& state, uint32_t head_dim, uint32_t t) {
  Vec acc[Rows][1][Vecs];
  for_accumulators<Rows, 1, Vecs>([&](uint32_t r, uint32_t p, uint32_t v) { acc[r][p][v] = Vec::zero(); });
  const float* const w[1] = {state.keys + t};
  accumulate<F32Panel>(acc, state.queries, state.dim_stride, w, state.key_stride, head_dim, nothing_ahead);
  for_accumulators<Rows, 1, Vecs>([&](uint32_t r, uint32_t p, uint32_t v) {
    acc[r][p][v].store(state.scores + r * state.key_stride + t + v * W);
  });
}

/** scores (Rows, keys) up to key `end`. */
template <uint32_t Rows>
inline void score_queries(const AttentionState& state, uint32_t head_dim, uint32_t end) {
  constexpr uint32_t wide = wide_vecs<Rows>;
  uint32_t t = 0;
  for (; t + tile_outputs < end && t + wide * W <= state.key_stride; t += wide * W) {
    score_keys<Rows, wide>(state, head_dim, t);
  }
  for (; t < end; t += tile_outputs) score_keys<Rows, tile_vecs>(state, head_dim, t);
}

inline void add_alibi(float* scores, KeyRange range, float slope, uint32_t position, uint32_t base) {
  const float distance = static_cast<float>(base) - static_cast<float>(position);
  for (uint32_t t = range.begin; t < range.end; ++t) scores[t] += slope * (distance + static_cast<float>(t));
}

/** Scores outside the range, up to whole vectors, become -inf; the largest of the rest and `maximum`. */
inline float largest_score(float* scores, KeyRange range, float maximum) {
  const uint32_t begin = range.begin / W * W;
  const uint32_t end = round_up(range.end, W);
  for (uint32_t t = begin; t < range.begin; ++t) scores[t] = -__builtin_inff();
  for (uint32_t t = range.end; t < end; ++t) scores[t] = -__builtin_inff();
  Vec most = Vec::set(maximum);
  for (uint32_t t = begin; t < end; t += W) most = Vec::max(Vec::load(scores + t), most);
  return max_of(most);
}

/** Scores become weights e^(score - maximum); their sum. */
inline float weigh_scores(float* scores, KeyRange range, float maximum) {
  const Vec offset = Vec::set(maximum);
  Vec total = Vec::zero();
  for (uint32_t t = range.begin / W * W; t < range.end; t += W) {
    const Vec weight = exp_of(Vec::load(scores + t) - offset);
    weight.store(scores + t);
    total = total + weight;
  }
  return sum_of(total);
}

/** Scores of `count` queries become weights, sums run on; shrink[i]: what query i's earlier sums shrink by. */
inline void update_softmax(const AttentionState& state, uint32_t query, uint32_t count, const KeyRange* ranges,
                           float* shrink) {
  static_assert(query_rows <= 2 * W);
  alignas(64) float maxima[2 * W] = {};
  alignas(64) float steps[2 * W] = {};
  for (uint32_t i = 0; i < count; ++i) {
    if (ranges[i].is_empty()) continue;
    const float before = state.maxima[query + i];
    maxima[i] = largest_score(state.scores + i * state.key_stride, ranges[i], before);
    steps[i] = before - maxima[i];
    state.maxima[query + i] = maxima[i];
  }
  for (uint32_t i = 0; i < count; i += W) exp_of(Vec::load(steps + i)).store(shrink + i);
  for (uint32_t i = 0; i < count; ++i) {
    if (ranges[i].is_empty()) continue;
    const float sum = weigh_scores(state.scores + i * state.key_stride, ranges[i], maxima[i]);
    state.sums[query + i] = state.sums[query + i] * shrink[i] + sum;
  }
}

/** The values of a tile, as they lie: (block_tokens, head_dim). */
template <class Panel>
struct Values {
  const typename Panel::Stored* data;
  uint32_t head_dim;
};

/** Dims [d, d + Vecs W) of: outputs = outputs * shrink + weights . values. Past head_dim they are anything. */
template <class Panel, uint32_t Rows, uint32_t Vecs>
inline void add_dims(const Values<Panel>& values, float* outputs, uint32_t dim_stride, const float* weights,
                     uint32_t key_stride, const float* shrink, KeyRange range, uint32_t d) {
  Vec acc[Rows][1][Vecs];
  for_accumulators<Rows, 1, Vecs>([&](uint32_t r, uint32_t p, uint32_t v) {
    acc[r][p][v] = Vec::load(outputs + r * dim_stride + d + v * W) * Vec::set(shrink[r]);
  });
  const typename Panel::Stored* const w[1] = {values.data + static_cast<uint64_t>(range.begin) * values.head_dim + d};
  accumulate<Panel>(acc, weights + range.begin, key_stride, w, values.head_dim, range.end - range.begin, nothing_ahead);
  for_accumulators<Rows, 1, Vecs>([&](uint32_t r, uint32_t p, uint32_t v) {
    acc[r][p][v].store(outputs + r * dim_stride + d + v * W);
  });
}

/** outputs = outputs * shrink + weights . values for queries [query, query + Rows), which have the same keys. */
template <class Panel, uint32_t Rows>
inline void add_values(const AttentionState& state, const Values<Panel>& values, uint32_t query, const float* weights,
                       const float* shrink, KeyRange range) {
  constexpr uint32_t wide = wide_vecs<Rows>;
  float* outputs = state.outputs + static_cast<uint64_t>(query) * state.dim_stride;
  uint32_t d = 0;
  for (; d + wide * W <= state.dim_stride; d += wide * W) {
    add_dims<Panel, Rows, wide>(values, outputs, state.dim_stride, weights, state.key_stride, shrink, range, d);
  }
  for (; d < state.dim_stride; d += tile_outputs) {
    add_dims<Panel, Rows, tile_vecs>(values, outputs, state.dim_stride, weights, state.key_stride, shrink, range, d);
  }
}

/** `count` queries, up to query_rows, against the tile at `base`. */
template <class Panel>
inline void attend_tile(const AttentionTask& task, const AttentionPiece& piece, const AttentionState& state,
                        const Values<Panel>& values, uint32_t query, uint32_t count, uint32_t base) {
  const kvs_device_config& config = *task.config;
  const uint32_t heads = piece.head_end - piece.head_begin;
  KeyRange ranges[query_rows];
  KeyRange widest{config.block_tokens, 0};
  bool is_uniform = true;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t row = piece.row_begin + (query + i) / heads;
    const uint32_t head = piece.head_begin + (query + i) % heads;
    const uint32_t position = static_cast<uint32_t>(task.step->row_position[row]);
    ranges[i] = keys_of(position, task.window, base, config.block_tokens);
    is_uniform = is_uniform && ranges[i].begin == ranges[0].begin && ranges[i].end == ranges[0].end;
    if (ranges[i].is_empty()) continue;
    widest = {min_of(widest.begin, ranges[i].begin), max_of(widest.end, ranges[i].end)};
    const float* q = task.q + (static_cast<uint64_t>(row) * config.heads + head) * config.head_dim;
    rotate(state.queries + i * state.dim_stride, q, task.rope, config.rotary_dim, config.head_dim, position - base,
           config.attention_scale);
  }
  if (widest.is_empty()) return;
  with_count<query_rows>(count, [&](auto rows) {
    score_queries<decltype(rows)::value>(state, config.head_dim, widest.end);
  });
  if (task.alibi_slopes != nullptr) {
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t row = piece.row_begin + (query + i) / heads;
      const uint32_t head = piece.head_begin + (query + i) % heads;
      add_alibi(state.scores + i * state.key_stride, ranges[i], task.alibi_slopes[head],
                static_cast<uint32_t>(task.step->row_position[row]), base);
    }
  }
  alignas(64) float shrink[2 * W];
  update_softmax(state, query, count, ranges, shrink);
  if (is_uniform) {
    with_count<query_rows>(count, [&](auto rows) {
      add_values<Panel, decltype(rows)::value>(state, values, query, state.scores, shrink, ranges[0]);
    });
    return;
  }
  for (uint32_t i = 0; i < count; ++i) {
    if (!ranges[i].is_empty()) {
      add_values<Panel, 1>(state, values, query + i, state.scores + i * state.key_stride, shrink + i, ranges[i]);
    }
  }
}

/** y = output / sum, in the order of dims. */
template <class Panel>
inline void write_output(float* y, const float* output, float sum, uint32_t head_dim) {
  const Vec scale = Vec::set(1.0f / sum);
  for (uint32_t d = 0; d < head_dim; d += 2 * W) {
    Vec a = Vec::load(output + d) * scale;
    Vec b = Vec::load(output + d + W) * scale;
    if constexpr (Panel::is_paired) Vec::zip(a, b);
    F32::store(y + d, min_of(W, head_dim - d), a);
    if (d + W < head_dim) F32::store(y + d + W, min_of(W, head_dim - d - W), b);
  }
}

template <class Panel>
inline void write_outputs(const AttentionTask& task, const AttentionPiece& piece, const AttentionState& state) {
  const uint32_t head_dim = task.config->head_dim;
  const uint32_t heads = piece.head_end - piece.head_begin;
  for (uint32_t query = 0; query < (piece.row_end - piece.row_begin) * heads; ++query) {
    const uint64_t row = piece.row_begin + query / heads;
    const uint32_t head = piece.head_begin + query % heads;
    write_output<Panel>(task.y + (row * task.config->heads + head) * head_dim,
                        state.outputs + static_cast<uint64_t>(query) * state.dim_stride, state.sums[query], head_dim);
  }
}

/** Type: how keys are read; Panel: how values are. */
template <class Type, class Panel>
void attend(const AttentionTask& task, const AttentionPiece& piece, Scratch& scratch) {
  using Stored = typename Type::Stored;
  const kvs_device_config& config = *task.config;
  const uint32_t block_tokens = config.block_tokens;
  const uint32_t queries = (piece.row_end - piece.row_begin) * (piece.head_end - piece.head_begin);
  const AttentionState state = make_state(config, queries, scratch);
  __builtin_memset(state.outputs, 0, static_cast<uint64_t>(queries) * state.dim_stride * sizeof(float));
  for (uint32_t i = 0; i < queries; ++i) {
    state.maxima[i] = -__builtin_inff();
    state.sums[i] = 0.0f;
  }
  const uint32_t first = static_cast<uint32_t>(task.step->row_position[piece.row_begin]);
  const uint32_t last = static_cast<uint32_t>(task.step->row_position[piece.row_end - 1]);
  const uint32_t first_key = task.window == 0 || first < task.window ? 0 : first - task.window + 1;
  const int32_t* table = task.step->block_table + task.step->sequences[piece.sequence].table_begin;
  const uint64_t head_values = static_cast<uint64_t>(block_tokens) * config.head_dim;
  for (uint32_t j = first_key / block_tokens; j <= last / block_tokens; ++j) {
    if (table[j] < 0) continue;
    const uint32_t base = j * block_tokens;
    const char* block = task.kv.blocks + static_cast<uint64_t>(table[j]) * task.kv.block_stride;
    const Stored* keys = reinterpret_cast<const Stored*>(block) + piece.kv_head * head_values;
    load_keys<Type>(state, config, keys, round_up(min_of(block_tokens, last + 1 - base), turned_rows));
    const Values<Panel> values{keys + config.kv_heads * head_values, config.head_dim};
    for (uint32_t query = 0; query < queries; query += query_rows) {
      attend_tile<Panel>(task, piece, state, values, query, min_of(query_rows, queries - query), base);
    }
  }
  write_outputs<Panel>(task, piece, state);
}

// ---- the operation

/** Items: chunks of rows, times key-value heads, times parts of a head's queries. */
struct AttentionPlan {
  uint32_t chunk_rows;
  uint32_t chunks;
  uint32_t head_parts;
  uint32_t part_heads;
};

inline AttentionPlan plan_attention(const AttentionTask& task) {
  const uint32_t rows = task.step->row_count;
  const uint32_t group = task.config->heads / task.config->kv_heads;
  const uint32_t rows_max = max_of(1, item_queries_max / group);
  // Four items a thread even out their sizes.
  const uint32_t wanted = rows * task.config->kv_heads / (4 * task.thread_count);
  const uint32_t chunk_rows = max_of(1, min_of(rows_max, wanted));
  const uint32_t chunks = quotient_up(rows, chunk_rows);
  const uint32_t parts = min_of(group, quotient_up(task.thread_count, chunks * task.config->kv_heads));
  const uint32_t part_heads = quotient_up(group, parts);
  return {chunk_rows, chunks, quotient_up(group, part_heads), part_heads};
}

uint32_t attention_items(const AttentionTask& task) {
  const AttentionPlan plan = plan_attention(task);
  return plan.chunks * task.config->kv_heads * plan.head_parts;
}

void attention(const AttentionTask& task, uint32_t item, Scratch& scratch) {
  const AttentionPlan plan = plan_attention(task);
  const StepInput& step = *task.step;
  const uint32_t group = task.config->heads / task.config->kv_heads;
  const uint32_t kv_head = item / plan.head_parts % task.config->kv_heads;
  const uint32_t part = item % plan.head_parts;
  const uint32_t head_begin = kv_head * group + part * plan.part_heads;
  const uint32_t head_end = min_of(head_begin + plan.part_heads, (kv_head + 1) * group);
  // The last rows of a prompt have the most keys: they go first.
  const uint32_t chunk = plan.chunks - 1 - item / (plan.head_parts * task.config->kv_heads);
  const uint32_t end = min_of(step.row_count, (chunk + 1) * plan.chunk_rows);
  for (uint32_t row = chunk * plan.chunk_rows; row < end;) {
    uint32_t piece_end = row + 1;
    while (piece_end < end && step.row_sequence[piece_end] == step.row_sequence[row]) ++piece_end;
    if (step.row_sequence[row] >= 0) {
      const uint32_t sequence = static_cast<uint32_t>(step.row_sequence[row]);
      const AttentionPiece piece{sequence, row, piece_end, kv_head, head_begin, head_end};
      scratch.reset();
      switch (task.kv.dtype) {
        case KVS_F32: attend<F32, F32Panel>(task, piece, scratch); break;
        case KVS_F16: attend<F16, F16Panel>(task, piece, scratch); break;
        default: attend<BF16, BF16Panel>(task, piece, scratch);
      }
    }
    row = piece_end;
  }
}
