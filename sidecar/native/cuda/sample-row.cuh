// One row of logits as the sampler sees it: an order (likeliest first, of equals the lowest id) and a mass for each
// token, an integer, so that sums are exact and no result depends on the order of threads.

#pragma once

#include <cstdint>

namespace kvs {

struct LogitRow {
  const float* logits;
  uint32_t size;
  uint32_t begin;  // ids [begin, end): this block's share
  uint32_t end;
  float max;
  float scale;  // 1 / temperature

  /** In [0, 1]; the likeliest token has 1. */
  __device__ float weight(float logit) const { return expf((logit - max) * scale); }
  /** weight * 2^31. What is less likely than the likeliest by 2^-32 has none: a uniform of 24 bits could not meet it.
   */
  __device__ static uint32_t mass_of_weight(float weight) { return __float2uint_rn(weight * 0x1p31f); }
  __device__ uint32_t mass(float logit) const { return mass_of_weight(weight(logit)); }
};

inline constexpr uint32_t rank_bits = 56;
inline constexpr uint64_t rank_last = (1ull << rank_bits) - 1;

/** Lower is likelier: the logit, descending, in the upper 32 of 56 bits, then the id. Not for NaN. */
__device__ inline uint64_t rank_of(float logit, uint32_t id) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 counts as 0
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 24 | id;
}

__device__ inline uint32_t id_of_rank(uint64_t rank) { return static_cast<uint32_t>(rank & 0xFFFFFFu); }

/** body(logit, id) for the ids of [begin, end), spread over `count` threads of which this is number `index`. */
template <class Body>
__device__ void for_logits(const float* logits, uint32_t begin, uint32_t end, uint32_t index, uint32_t count,
                           const Body& body) {
  constexpr uint32_t unrolled = 8;
  uint32_t id = begin + index;
  for (; id + (unrolled - 1) * count < end; id += unrolled * count) {
    float values[unrolled];
#pragma unroll
    for (uint32_t k = 0; k < unrolled; ++k) values[k] = logits[id + k * count];
#pragma unroll
    for (uint32_t k = 0; k < unrolled; ++k) body(values[k], id + k * count);
  }
  for (; id < end; id += count) body(logits[id], id);
}

}  // namespace kvs
