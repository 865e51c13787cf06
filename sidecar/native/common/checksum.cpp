// kvs_checksum: guards blocks against rot and torn writes. Sixteen 32 x 32 -> 64 bit multiply-accumulate lanes with
// distinct per-position keys, folded by 64-bit mixing; plain loops that every compiler vectorises, here for each width
// of vectors, of which the loader takes the one that the processor has.

#include <cstdint>
#include <cstring>

#include "../kvasir.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define KVS_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KVS_VECTOR_CLONES
#endif

namespace {

constexpr int lanes = 16;
constexpr uint64_t stripe_bytes = lanes * 8;

uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 32)) * 0x9FB21C651E98DF25ull;
  value = (value ^ (value >> 35)) * 0xC2B2AE3D27D4EB4Full;
  return value ^ (value >> 28);
}

/** Words are multiplied by halves under a key that moves with the stripe: swapped or zeroed parts show. */
inline void accumulate(uint64_t* __restrict sums, const uint64_t* __restrict keys, const unsigned char* data) {
  uint64_t words[lanes];
  std::memcpy(words, data, stripe_bytes);
  for (int i = 0; i < lanes; ++i) {
    const uint64_t keyed = words[i] ^ keys[i];
    sums[i] += (keyed & 0xFFFFFFFFull) * (keyed >> 32) + words[i];
  }
}

}  // namespace

extern "C" KVS_VECTOR_CLONES uint64_t kvs_checksum(const void* data, uint64_t bytes) {
  uint64_t sums[lanes];
  uint64_t keys[lanes];
  for (int i = 0; i < lanes; ++i) {
    sums[i] = mix(0x9E3779B97F4A7C15ull * (i + 1));
    keys[i] = mix(0xD1B54A32D192ED03ull * (i + 1));
  }
  const unsigned char* at = static_cast<const unsigned char*>(data);
  uint64_t left = bytes;
  for (; left >= stripe_bytes; left -= stripe_bytes, at += stripe_bytes) {
    accumulate(sums, keys, at);
    for (int i = 0; i < lanes; ++i) keys[i] += 0x9E3779B97F4A7C15ull;
  }
  if (left != 0) {
    unsigned char tail[stripe_bytes] = {};
    std::memcpy(tail, at, left);
    accumulate(sums, keys, tail);
  }
  uint64_t hash = mix(bytes * 0x9E3779B97F4A7C15ull);
  for (int i = 0; i < lanes; ++i) hash = mix(hash ^ sums[i]) * 0x9E3779B97F4A7C15ull;
  return mix(hash);
}
