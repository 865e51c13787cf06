// A vector of floats, W wide, with the same operations for every instruction set. Included once by each kernels.*.cpp,
// inside an anonymous namespace: nothing here may be shared between files of different instruction sets.

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
  static constexpr uint32_t W = 16;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, uint32_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load_bf16(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load_bf16(const uint16_t* p, uint32_t n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  /** 2 W elements at even and at odd places. */
  static void load_bf16_pairs(const uint16_t* p, Vec& even, Vec& odd) {
    const __m512i words = _mm512_loadu_si512(p);
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static Vec load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load_f16(const uint16_t* p, uint32_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, uint32_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  void store_bf16(uint16_t* p, uint32_t n) const { _mm256_mask_storeu_epi16(p, mask(n), narrow()); }
  void store_f16(uint16_t* p, uint32_t n) const {
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm512_div_ps(v, b.v)}; }
  /** a * b + c, one rounding where the instruction set has it. */
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  /** The second operand where either is NaN. */
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  Vec round() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  /** this * 2^n, n an integer from -126 to 127. */
  Vec scale_by_power(Vec n) const {
    const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(v, _mm512_castsi512_ps(bits))};
  }
  /** this where x >= limit or x is NaN, else zero. */
  Vec zero_below(Vec x, float limit) const {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), v)};
  }
  Vec abs() const { return {_mm512_abs_ps(v)}; }
  Vec with_sign_of(Vec s) const {
    return {_mm512_or_ps(v, _mm512_and_ps(s.v, _mm512_set1_ps(-0.0f)))};
  }
  bool any_nan() const { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
  /** Both operands' lanes in turns: a0 b0 a1 b1 ... */
  static void zip(Vec& a, Vec& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 first = _mm512_permutex2var_ps(a.v, low, b.v);
    b = {_mm512_permutex2var_ps(a.v, high, b.v)};
    a = {first};
  }
  __m256 low_half() const { return _mm512_castps512_ps256(v); }
  __m256 high_half() const { return _mm512_extractf32x8_ps(v, 1); }

 private:
  static __mmask16 mask(uint32_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
  __m256i narrow() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

#elif defined(__AVX2__)

struct Vec {
  __m256 v;
  static constexpr uint32_t W = 8;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, uint32_t n) { return {_mm256_maskload_ps(p, mask(n))}; }
  static Vec load_bf16(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load_bf16(const uint16_t* p, uint32_t n) { return widen(partial(p, n)); }
  static void load_bf16_pairs(const uint16_t* p, Vec& even, Vec& odd) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static Vec load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec load_f16(const uint16_t* p, uint32_t n) { return {_mm256_cvtph_ps(partial(p, n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, uint32_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
  void store_bf16(uint16_t* p, uint32_t n) const { store_partial(p, n, narrow()); }
  void store_f16(uint16_t* p, uint32_t n) const {
    store_partial(p, n, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_ps(v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  Vec round() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vec scale_by_power(Vec n) const {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(v, _mm256_castsi256_ps(bits))};
  }
  Vec zero_below(Vec x, float limit) const {
    return {_mm256_and_ps(v, _mm256_cmp_ps(x.v, _mm256_set1_ps(limit), _CMP_NLT_UQ))};
  }
  Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  Vec with_sign_of(Vec s) const { return {_mm256_or_ps(v, _mm256_and_ps(s.v, _mm256_set1_ps(-0.0f)))}; }
  bool any_nan() const { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
  static void zip(Vec& a, Vec& b) {
    const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
    a = {_mm256_permute2f128_ps(low, high, 0x20)};
    b = {_mm256_permute2f128_ps(low, high, 0x31)};
  }

 private:
  static __m256i mask(uint32_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m128i partial(const uint16_t* p, uint32_t n) {
    alignas(16) uint16_t lanes[8] = {};
    for (uint32_t i = 0; i < n; ++i) lanes[i] = p[i];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
  }
  static void store_partial(uint16_t* p, uint32_t n, __m128i h) {
    if (n == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
      return;
    }
    alignas(16) uint16_t lanes[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), h);
    for (uint32_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static Vec widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
  __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(words, words);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

#else

// Sixteen lanes instead of four compile the shapes of AVX-512 for any processor.
#ifndef KVS_PORTABLE_LANES
#define KVS_PORTABLE_LANES 4
#endif

/** Four floats in the compiler's own vector type: SSE2, NEON or whatever there is. */
struct Vec {
  static constexpr uint32_t W = KVS_PORTABLE_LANES;
  typedef float Lanes __attribute__((vector_size(4 * W)));
  typedef int32_t Ints __attribute__((vector_size(4 * W)));
  Lanes v;
  static Vec zero() { return {Lanes{}}; }
  static Vec set(float x) { return {x - Lanes{}}; }  // x - 0 is x, -0 included
  static Vec load(const float* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static Vec load(const float* p, uint32_t n) {
    return gather(n, [p](uint32_t i) { return p[i]; });
  }
  static Vec load_bf16(const uint16_t* p) { return load_bf16(p, W); }
  static Vec load_bf16(const uint16_t* p, uint32_t n) {
    return gather(n, [p](uint32_t i) { return float_of_bf16(p[i]); });
  }
  static void load_bf16_pairs(const uint16_t* p, Vec& even, Vec& odd) {
    Ints words;
    __builtin_memcpy(&words, p, sizeof words);
    even = {reinterpret_cast<Lanes>(words << 16)};
    odd = {reinterpret_cast<Lanes>(words & static_cast<int32_t>(0xFFFF0000u))};
  }
  static Vec load_f16(const uint16_t* p) { return load_f16(p, W); }
  static Vec load_f16(const uint16_t* p, uint32_t n) {
    return gather(n, [p](uint32_t i) { return float_of_f16(p[i]); });
  }
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
  void store(float* p, uint32_t n) const {
    for (uint32_t i = 0; i < n; ++i) p[i] = v[i];
  }
  void store_bf16(uint16_t* p, uint32_t n) const {
    for (uint32_t i = 0; i < n; ++i) p[i] = bf16_of_float(v[i]);
  }
  void store_f16(uint16_t* p, uint32_t n) const {
    for (uint32_t i = 0; i < n; ++i) p[i] = f16_of_float(v[i]);
  }
  Vec operator+(Vec b) const { return {v + b.v}; }
  Vec operator-(Vec b) const { return {v - b.v}; }
  Vec operator*(Vec b) const { return {v * b.v}; }
  Vec operator/(Vec b) const { return {v / b.v}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  static Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  /** To the nearest integer, for |v| < 2^22. */
  Vec round() const {
    const Lanes magic = set(12582912.0f).v;
    return {(v + magic) - magic};
  }
  Vec scale_by_power(Vec n) const {
    const Ints bits = (__builtin_convertvector(n.v, Ints) + 127) << 23;
    return {v * reinterpret_cast<Lanes>(bits)};
  }
  Vec zero_below(Vec x, float limit) const { return {x.v < set(limit).v ? zero().v : v}; }
  Vec abs() const { return {reinterpret_cast<Lanes>(reinterpret_cast<Ints>(v) & 0x7FFFFFFF)}; }
  Vec with_sign_of(Vec s) const {
    return {reinterpret_cast<Lanes>(reinterpret_cast<Ints>(v) | (reinterpret_cast<Ints>(s.v) & INT32_MIN))};
  }
  bool any_nan() const {
    for (uint32_t i = 0; i < W; ++i) {
      if (v[i] != v[i]) return true;
    }
    return false;
  }
  static void zip(Vec& a, Vec& b) {
    const Vec even = a, odd = b;
    for (uint32_t i = 0; i < W; ++i) {
      (i < W / 2 ? a.v[2 * i] : b.v[2 * i - W]) = even.v[i];
      (i < W / 2 ? a.v[2 * i + 1] : b.v[2 * i + 1 - W]) = odd.v[i];
    }
  }

 private:
  template <class Element>
  static Vec gather(uint32_t n, const Element& element) {
    Vec r = zero();
    for (uint32_t i = 0; i < n; ++i) r.v[i] = element(i);
    return r;
  }
};

#endif

constexpr uint32_t W = Vec::W;

constexpr uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
constexpr uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

#if defined(__AVX2__)

#if defined(__AVX512F__)
inline __m256 halves_added(Vec a) { return _mm256_add_ps(a.low_half(), a.high_half()); }
inline __m256 halves_max(Vec a) { return _mm256_max_ps(a.low_half(), a.high_half()); }
#else
inline __m256 halves_added(Vec a) { return a.v; }
inline __m256 halves_max(Vec a) { return a.v; }
#endif

/** Lanes added in halves: the same order for any W that is a power of two. */
inline float sum_of(Vec a) {
  const __m256 eight = halves_added(a);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/** Of lanes without NaN. */
inline float max_of(Vec a) {
  const __m256 eight = halves_max(a);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

inline float sum_of(Vec a) {
  alignas(64) float lanes[W];
  a.store(lanes);
  for (uint32_t half = W / 2; half != 0; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline float max_of(Vec a) {
  alignas(64) float lanes[W];
  a.store(lanes);
  float most = lanes[0];
  for (uint32_t i = 1; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

#endif

/** e^x to about 2 ulp; 0 below -87.3 (also for -inf), NaN stays. */
inline Vec exp_of(Vec x) {
  const float lowest = -87.33f;
  const Vec bounded = Vec::max(Vec::set(lowest), Vec::min(Vec::set(88.0f), x));
  const Vec n = (bounded * Vec::set(1.44269504f)).round();
  Vec r = Vec::fma(n, Vec::set(-0.693359375f), bounded);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set(5.0000001201e-1f));
  p = Vec::fma(p, r * r, r) + Vec::set(1.0f);
  return p.scale_by_power(n).zero_below(x, lowest);
}

/** Calls body(offset, lanes) over [0, size), W at a time; the last call may have fewer lanes. */
template <class Body>
inline void for_lanes(uint32_t size, const Body& body) {
  uint32_t i = 0;
  for (; i + W <= size; i += W) body(i, W);
  if (i < size) body(i, size - i);
}

struct F32 {
  using Stored = float;
  static Vec load(const float* p) { return Vec::load(p); }
  static Vec load(const float* p, uint32_t n) { return n == W ? Vec::load(p) : Vec::load(p, n); }
  static void store(float* p, uint32_t n, Vec v) { n == W ? v.store(p) : v.store(p, n); }
  static float to_float(float x) { return x; }
};
struct F16 {
  using Stored = uint16_t;
  static Vec load(const uint16_t* p) { return Vec::load_f16(p); }
  static Vec load(const uint16_t* p, uint32_t n) { return n == W ? Vec::load_f16(p) : Vec::load_f16(p, n); }
  static void store(uint16_t* p, uint32_t n, Vec v) { v.store_f16(p, n); }
};
struct BF16 {
  using Stored = uint16_t;
  static Vec load(const uint16_t* p) { return Vec::load_bf16(p); }
  static Vec load(const uint16_t* p, uint32_t n) { return n == W ? Vec::load_bf16(p) : Vec::load_bf16(p, n); }
  static void store(uint16_t* p, uint32_t n, Vec v) { v.store_bf16(p, n); }
};

/** body(type) with the type of this dtype. */
template <class Body>
inline void with_dtype(kvs_dtype dtype, const Body& body) {
  switch (dtype) {
    case KVS_F32: body(F32{}); return;
    case KVS_F16: body(F16{}); return;
    default: body(BF16{}); return;
  }
}
