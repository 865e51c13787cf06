// Kernels of one row: embedding, norms, activations, passes over logits.

void embed(const EmbedTask& task, uint32_t row) {
  const WeightView& weight = task.weight;
  float* y = task.y + static_cast<uint64_t>(row) * weight.cols;
  const int32_t sequence = task.step->row_sequence[row];
  uint32_t token = 0;  // padding computes garbage, of a token that exists
  if (sequence >= 0) {
    const uint64_t slot = static_cast<uint64_t>(task.step->sequences[sequence].slot);
    token = static_cast<uint32_t>(task.tokens[slot * task.token_stride + task.step->row_position[row]]);
  }
  with_dtype(weight.dtype, [&](auto type) {
    using Type = decltype(type);
    using Stored = typename Type::Stored;
    const Stored* from = reinterpret_cast<const Stored*>(weight.panel(token / panel_rows)) +
                         place_in_panel(token % panel_rows, weight.dtype);
    alignas(64) Stored lanes[W];
    for_lanes(weight.cols, [&](uint32_t col, uint32_t n) {
      for (uint32_t i = 0; i < n; ++i) lanes[i] = from[static_cast<uint64_t>(col + i) * panel_rows];
      F32::store(y + col, n, Type::load(lanes));
    });
  });
}

/** Sum of squares in four accumulators: the order depends on the size alone. */
inline float sum_of_squares(const float* x, uint32_t size, float shift) {
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  const Vec offset = Vec::set(shift);
  uint32_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W) {
    for (uint32_t k = 0; k < 4; ++k) {
      const Vec d = Vec::load(x + i + k * W) - offset;
      sums[k] = Vec::fma(d, d, sums[k]);
    }
  }
  float tail = 0.0f;
  for (; i < size; ++i) tail += (x[i] - shift) * (x[i] - shift);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail;
}

inline float sum_row(const float* x, uint32_t size) {
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  uint32_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W) {
    for (uint32_t k = 0; k < 4; ++k) sums[k] = sums[k] + Vec::load(x + i + k * W);
  }
  float tail = 0.0f;
  for (; i < size; ++i) tail += x[i];
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail;
}

inline void rms_norm_row(float* y, const float* x, const float* weight, uint32_t size, float epsilon) {
  const float mean = sum_of_squares(x, size, 0.0f) / static_cast<float>(size);
  const Vec scale = Vec::set(1.0f / __builtin_sqrtf(mean + epsilon));
  for_lanes(size, [&](uint32_t i, uint32_t n) {
    F32::store(y + i, n, F32::load(x + i, n) * scale * F32::load(weight + i, n));
  });
}

void rms_norm(const NormTask& task, uint32_t row) {
  const uint64_t at = static_cast<uint64_t>(row) * task.size;
  rms_norm_row(task.y + at, task.x + at, task.weight, task.size, task.epsilon);
}

void layer_norm(const NormTask& task, uint32_t row) {
  const uint64_t at = static_cast<uint64_t>(row) * task.size;
  const float* x = task.x + at;
  float* y = task.y + at;
  const float size = static_cast<float>(task.size);
  const float mean = sum_row(x, task.size) / size;
  const float variance = sum_of_squares(x, task.size, mean) / size;
  const Vec scale = Vec::set(1.0f / __builtin_sqrtf(variance + task.epsilon));
  const Vec offset = Vec::set(mean);
  for_lanes(task.size, [&](uint32_t i, uint32_t n) {
    const Vec bias = task.bias == nullptr ? Vec::zero() : F32::load(task.bias + i, n);
    F32::store(y + i, n, Vec::fma((F32::load(x + i, n) - offset) * scale, F32::load(task.weight + i, n), bias));
  });
}

void silu_mul(const ActivationTask& task, uint32_t row) {
  float* y = task.y + static_cast<uint64_t>(row) * task.size;
  const float* gate = task.x + 2ull * row * task.size;
  const float* up = gate + task.size;
  const Vec one = Vec::set(1.0f);
  for_lanes(task.size, [&](uint32_t i, uint32_t n) {
    const Vec g = F32::load(gate + i, n);
    const Vec sigmoid_inverse = one + exp_of(Vec::zero() - g);
    F32::store(y + i, n, g / sigmoid_inverse * F32::load(up + i, n));
  });
}

/** erf by Abramowitz and Stegun 7.1.26, absolute error below 2e-7. */
inline Vec erf_of(Vec x) {
  const Vec z = x.abs();
  const Vec t = Vec::set(1.0f) / Vec::fma(z, Vec::set(0.3275911f), Vec::set(1.0f));
  Vec p = Vec::set(1.061405429f);
  p = Vec::fma(p, t, Vec::set(-1.453152027f));
  p = Vec::fma(p, t, Vec::set(1.421413741f));
  p = Vec::fma(p, t, Vec::set(-0.284496736f));
  p = Vec::fma(p, t, Vec::set(0.254829592f)) * t;
  const Vec result = Vec::set(1.0f) - p * exp_of(Vec::zero() - z * z);
  return result.with_sign_of(x);
}

void gelu(const ActivationTask& task, uint32_t row) {
  const uint64_t at = static_cast<uint64_t>(row) * task.size;
  for_lanes(task.size, [&](uint32_t i, uint32_t n) {
    const Vec x = F32::load(task.x + at + i, n);
    const Vec half = x * Vec::set(0.5f);
    F32::store(task.y + at + i, n, Vec::fma(half, erf_of(x * Vec::set(0.70710678f)), half));
  });
}

LogitStats logit_stats(const float* logits, uint32_t size) {
  Vec most = Vec::set(-__builtin_inff());
  bool has_nan = false;
  for_lanes(size, [&](uint32_t i, uint32_t n) {
    Vec x = F32::load(logits + i, n);
    if (__builtin_expect(x.any_nan(), 0)) has_nan = true;
    if (n < W) {  // lanes past the end hold zeros
      for (uint32_t k = 0; k < n; ++k) most = Vec::max(Vec::set(logits[i + k]), most);
      return;
    }
    most = Vec::max(x, most);
  });
  const float max = max_of(most);
  uint32_t argmax = 0;
  while (argmax + 1 < size && logits[argmax] != max) ++argmax;
  return {max, argmax, has_nan};
}

double exp_sum(float* y, const float* logits, uint32_t size, float max, float scale) {
  const Vec offset = Vec::set(max);
  const Vec factor = Vec::set(scale);
  double total = 0.0;
  Vec sum = Vec::zero();
  uint32_t in_sum = 0;
  for_lanes(size, [&](uint32_t i, uint32_t n) {
    const Vec e = exp_of((F32::load(logits + i, n) - offset) * factor);
    if (y != nullptr) F32::store(y + i, n, e);
    if (n < W) {
      alignas(64) float lanes[W];
      e.store(lanes);
      for (uint32_t k = 0; k < n; ++k) total += lanes[k];
      return;
    }
    sum = sum + e;
    if (++in_sum == 64) {  // floats are added a little, then doubles take over
      total += sum_of(sum);
      sum = Vec::zero();
      in_sum = 0;
    }
  });
  return total + sum_of(sum);
}
