// Keys come as rows of dims; scores want lanes over keys. Turns eight rows at a time, widening on the way.

constexpr uint32_t turned_rows = 8;

/** to[d * to_stride + t] = from[t * from_stride + d] for t < 8 and d in [begin, end): any processor, any tail. */
template <class Type>
inline void turn_rows_slowly(float* to, uint64_t to_stride, const typename Type::Stored* from, uint64_t from_stride,
                             uint32_t begin, uint32_t end) {
  alignas(64) float lanes[W];
  for (uint32_t t = 0; t < turned_rows; ++t) {
    for (uint32_t d = begin; d < end; d += W) {
      const uint32_t n = min_of(W, end - d);
      Type::load(from + t * from_stride + d, n).store(lanes);
      for (uint32_t i = 0; i < n; ++i) to[(d + i) * to_stride + t] = lanes[i];
    }
  }
}

#if defined(__AVX2__)

/** An 8 x 8 matrix of 32-bit words, turned. */
inline __attribute__((always_inline)) void turn_words(__m256 (&rows)[8]) {
  __m256 pairs[8], quads[8];
#pragma GCC unroll 8
  for (uint32_t i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (uint32_t i = 0; i < 8; i += 4) {
    for (uint32_t k = 0; k < 2; ++k) {
      const __m256d a = _mm256_castps_pd(pairs[i + k]), b = _mm256_castps_pd(pairs[i + k + 2]);
      quads[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      quads[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 8
  for (uint32_t i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

inline __m256 eight_floats(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 eight_floats(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

/** The dims of eight rows that go through registers; returns how many. F32 and F16. */
template <class Type>
inline uint32_t turn_rows_fast(float* to, uint64_t to_stride, const typename Type::Stored* from, uint64_t from_stride,
                               uint32_t size) {
  uint32_t d = 0;
  for (; d + 8 <= size; d += 8) {
    __m256 rows[8];
#pragma GCC unroll 8
    for (uint32_t t = 0; t < 8; ++t) rows[t] = eight_floats(from + t * from_stride + d);
    turn_words(rows);
#pragma GCC unroll 8
    for (uint32_t i = 0; i < 8; ++i) _mm256_storeu_ps(to + (d + i) * to_stride, rows[i]);
  }
  return d;
}

/** Two dims of bf16 turn as one word. */
template <>
inline uint32_t turn_rows_fast<BF16>(float* to, uint64_t to_stride, const uint16_t* from, uint64_t from_stride,
                                     uint32_t size) {
  const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
  uint32_t d = 0;
  for (; d + 16 <= size; d += 16) {
    __m256 rows[8];
#pragma GCC unroll 8
    for (uint32_t t = 0; t < 8; ++t) rows[t] = eight_floats(reinterpret_cast<const float*>(from + t * from_stride + d));
    turn_words(rows);
#pragma GCC unroll 8
    for (uint32_t i = 0; i < 8; ++i) {
      const __m256i words = _mm256_castps_si256(rows[i]);
      _mm256_storeu_ps(to + (d + 2 * i) * to_stride, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
      _mm256_storeu_ps(to + (d + 2 * i + 1) * to_stride, _mm256_and_ps(rows[i], high));
    }
  }
  return d;
}

#else

template <class Type>
inline uint32_t turn_rows_fast(float*, uint64_t, const typename Type::Stored*, uint64_t, uint32_t) {
  return 0;
}

#endif

/** to (size, ...) = eight rows of `size` elements, turned. */
template <class Type>
inline void turn_rows(float* to, uint64_t to_stride, const typename Type::Stored* from, uint64_t from_stride,
                      uint32_t size) {
  const uint32_t done = turn_rows_fast<Type>(to, to_stride, from, from_stride, size);
  if (done < size) turn_rows_slowly<Type>(to, to_stride, from, from_stride, done, size);
}
