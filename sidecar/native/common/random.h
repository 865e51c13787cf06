// The random numbers that both libraries must agree on, bit for bit: sampling (Philox4x32-10, counter-based,
// so that neither batch nor order matters) and random weights.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define KVS_HOST_DEVICE __host__ __device__
#else
#define KVS_HOST_DEVICE
#endif

namespace kvs {

/**
 * First word of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11)
 * with counter (position, 0, 0, 0) and key (seed_low, seed_high).
 */
KVS_HOST_DEVICE inline uint32_t philox(uint32_t seed_low, uint32_t seed_high, uint32_t position) {
  uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * c0;
    const uint64_t product1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ seed_low;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ seed_high;
    c3 = static_cast<uint32_t>(product0);
    seed_low += 0x9E3779B9u;
    seed_high += 0xBB67AE85u;
  }
  return c0;
}

/** In [0, 1), a multiple of 2^-24: exact in float and in double. */
KVS_HOST_DEVICE inline float uniform(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

/** sqrt(3) * deviation: half the width of the uniform distribution with this standard deviation. */
inline float random_weight_scale(float deviation) {
  return static_cast<float>(std::sqrt(3.0) * static_cast<double>(deviation));
}

/** Element `index` (row * cols + col) of a random weight: one rounding, whatever the compiler fuses. */
KVS_HOST_DEVICE inline float random_weight(uint64_t seed, uint64_t index, float scale) {
  uint64_t z = (seed ^ 0x6A09E667F3BCC909ull) + (index + 1) * 0x9E3779B97F4A7C15ull;  // splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  const int32_t centred = static_cast<int32_t>(z >> 40) - (1 << 23);  // 24 bits: exact in float
  return static_cast<float>(centred) * (scale * 0x1p-23f);
}

}  // namespace kvs
