// Rotation, and the operation that stores a row's key and value: k turned by its offset in its block, so that the
// block means the same at any position of any view.

constexpr uint32_t head_dim_max = 512;

/** y = scale R(position) x, one head; dims past the rotated ones are only scaled. y must not be x. */
inline void rotate(float* y, const float* x, const RopeTable& rope, uint32_t rotary_dim, uint32_t head_dim,
                   uint32_t position, float scale) {
  const uint32_t pairs = rotary_dim / 2;
  const float* cosine = rope.cosine + static_cast<uint64_t>(position) * pairs;
  const float* sine = rope.sine + static_cast<uint64_t>(position) * pairs;
  const Vec factor = Vec::set(scale);
  for_lanes(pairs, [&](uint32_t i, uint32_t n) {
    const Vec c = F32::load(cosine + i, n) * factor;
    const Vec s = F32::load(sine + i, n) * factor;
    const Vec a = F32::load(x + i, n);
    const Vec b = F32::load(x + pairs + i, n);
    F32::store(y + i, n, a * c - b * s);
    F32::store(y + pairs + i, n, Vec::fma(a, s, b * c));
  });
  for_lanes(head_dim - rotary_dim, [&](uint32_t i, uint32_t n) {
    F32::store(y + rotary_dim + i, n, F32::load(x + rotary_dim + i, n) * factor);
  });
}

inline void store_head(char* to, kvs_dtype dtype, const float* from, uint32_t head_dim) {
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    typename Type::Stored* stored = reinterpret_cast<typename Type::Stored*>(to);
    for_lanes(head_dim, [&](uint32_t i, uint32_t n) { Type::store(stored + i, n, F32::load(from + i, n)); });
  });
}

void append_kv(const AppendKvTask& task, uint32_t row) {
  const kvs_device_config& c = *task.config;
  const uint32_t head_dim = c.head_dim;
  const float* q = task.qkv + static_cast<uint64_t>(row) * (c.heads + 2 * c.kv_heads) * head_dim;
  const float* k = q + c.heads * head_dim;
  const float* v = k + c.kv_heads * head_dim;
  float* q_out = task.q + static_cast<uint64_t>(row) * c.heads * head_dim;
  for (uint32_t head = 0; head < c.heads; ++head) {
    const uint32_t at = head * head_dim;
    if (task.q_norm != nullptr) {
      rms_norm_row(q_out + at, q + at, task.q_norm, head_dim, task.epsilon);
    } else {
      __builtin_memcpy(q_out + at, q + at, head_dim * sizeof(float));
    }
  }
  const int32_t sequence = task.step->row_sequence[row];
  if (sequence < 0) return;
  const uint32_t position = static_cast<uint32_t>(task.step->row_position[row]);
  const uint32_t offset = position % c.block_tokens;
  const int32_t block =
      task.step->block_table[task.step->sequences[sequence].table_begin + position / c.block_tokens];
  if (block < 0) return;
  const uint64_t head_bytes = head_dim * (task.kv.dtype == KVS_F32 ? 4ull : 2ull);
  char* keys = task.kv.blocks + static_cast<uint64_t>(block) * task.kv.block_stride + offset * head_bytes;
  char* values = keys + c.kv_heads * c.block_tokens * head_bytes;
  alignas(64) float normed[head_dim_max];
  alignas(64) float turned[head_dim_max];
  for (uint32_t head = 0; head < c.kv_heads; ++head) {
    const float* key = k + head * head_dim;
    if (task.k_norm != nullptr) {
      rms_norm_row(normed, key, task.k_norm, head_dim, task.epsilon);
      key = normed;
    }
    rotate(turned, key, task.rope, c.rotary_dim, head_dim, offset, 1.0f);
    const uint64_t at = head * c.block_tokens * head_bytes;
    store_head(keys + at, task.kv.dtype, turned, head_dim);
    store_head(values + at, task.kv.dtype, v + head * head_dim, head_dim);
  }
}
