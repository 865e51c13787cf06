// Where the likeliest tokens of a row end: the token at which their number, or their mass, reaches a target. A
// histogram over the distance to the likeliest logit finds the interval in which that happens; what lies in it is
// sorted. Intervals that hold too much (flat or far away) are cut further by the bits of the rank, which are unique.

#pragma once

#include "block-scan.cuh"
#include "sample-row.cuh"

namespace kvs {

inline constexpr uint32_t bin_count = 2 * scan_threads;
/** In units of e^-1: the last bin holds what is less likely than the first by e^-32. */
inline constexpr float bins_per_unit = 64.0f;
inline constexpr uint32_t list_capacity = scan_threads;
inline constexpr uint32_t digit_bits = 11;  // of bin_count

struct SelectMemory {
  uint64_t masses[bin_count];
  uint64_t list[list_capacity];  // ranks
  uint64_t partials[32];
  uint32_t counts[bin_count];
  uint32_t list_count;
  // What a search found.
  uint32_t bin;
  uint64_t count_before;
  uint64_t mass_before;
  uint64_t last_rank;
  uint64_t total_mass;
};

/** Tokens up to a rank, and their mass together. */
struct Selection {
  uint64_t last_rank;
  uint64_t mass;
};

/** A set of ranks: those of one distance bin, then of one value of the leading bits. */
struct Interval {
  uint32_t bin;
  uint64_t prefix = 0;
  uint32_t prefix_bits = 0;

  __device__ static uint32_t bin_of(const LogitRow& row, float logit) {
    const float distance = (row.max - logit) * row.scale * bins_per_unit;
    return distance < static_cast<float>(bin_count - 1) ? static_cast<uint32_t>(distance) : bin_count - 1;
  }
  __device__ bool holds(const LogitRow& row, float logit, uint64_t rank) const {
    return bin_of(row, logit) == bin && (prefix_bits == 0 || rank >> (rank_bits - prefix_bits) == prefix);
  }
  /** Which part of the interval, by the next bits of the rank. */
  __device__ uint32_t digit_of(uint64_t rank) const {
    const uint32_t shift = rank_bits > prefix_bits + digit_bits ? rank_bits - prefix_bits - digit_bits : 0;
    return static_cast<uint32_t>(rank >> shift) & (bin_count - 1);
  }
  __device__ Interval part(uint32_t digit) const {
    const uint32_t bits = min(digit_bits, rank_bits - prefix_bits);
    return {bin, prefix << bits | (digit & ((1u << bits) - 1)), prefix_bits + bits};
  }
};

/** Fills the histogram: bin_or_skip(logit, rank) gives the bin, or bin_count for none. */
template <class Bin>
__device__ void count_bins(const LogitRow& row, SelectMemory& memory, const Bin& bin_or_skip) {
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < bin_count; i += scan_threads) {
    memory.counts[i] = 0;
    memory.masses[i] = 0;
  }
  __syncthreads();
  for_logits(row.logits, 0, row.size, threadIdx.x, scan_threads, [&](float logit, uint32_t id) {
    const uint32_t bin = bin_or_skip(logit, rank_of(logit, id));
    if (bin == bin_count) return;
    atomicAdd(&memory.counts[bin], 1u);
    const uint64_t mass = row.mass(logit);
    if (mass != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&memory.masses[bin]), mass);
  });
  __syncthreads();
}

/** Finds the bin in which before + (counts or masses) reaches target; what comes before it goes to memory. */
__device__ inline void find_bin(SelectMemory& memory, uint64_t target, bool is_by_mass, uint64_t count_before,
                                uint64_t mass_before) {
  const uint32_t first = 2 * threadIdx.x;
  const uint64_t counts[2] = {memory.counts[first], memory.counts[first + 1]};
  const uint64_t masses[2] = {memory.masses[first], memory.masses[first + 1]};
  uint64_t count = count_before + block_exclusive_sum(counts[0] + counts[1], memory.partials);
  __syncthreads();
  uint64_t mass = mass_before + block_exclusive_sum(masses[0] + masses[1], memory.partials);
  for (uint32_t k = 0; k < 2; ++k) {
    const uint64_t before = is_by_mass ? mass : count;
    const uint64_t after = before + (is_by_mass ? masses[k] : counts[k]);
    if (before < target && target <= after) {
      memory.bin = first + k;
      memory.count_before = count;
      memory.mass_before = mass;
    }
    count += counts[k];
    mass += masses[k];
  }
  __syncthreads();
}

/** Bitonic sort of memory.list, ascending; places past list_count are filled with the last rank. */
__device__ inline void sort_list(SelectMemory& memory) {
  const uint32_t i = threadIdx.x;
  if (i >= memory.list_count) memory.list[i] = ~0ull;
  for (uint32_t width = 2; width <= list_capacity; width *= 2) {
    for (uint32_t step = width / 2; step > 0; step /= 2) {
      __syncthreads();
      const uint32_t other = i ^ step;
      if (other <= i) continue;
      const uint64_t a = memory.list[i];
      const uint64_t b = memory.list[other];
      if ((a > b) == ((i & width) == 0)) {
        memory.list[i] = b;
        memory.list[other] = a;
      }
    }
  }
  __syncthreads();
}

/** Gathers the ranks of the interval, which must fit, into memory.list, sorted. */
__device__ inline void list_interval(const LogitRow& row, SelectMemory& memory, const Interval& interval) {
  if (threadIdx.x == 0) memory.list_count = 0;
  __syncthreads();
  for_logits(row.logits, 0, row.size, threadIdx.x, scan_threads, [&](float logit, uint32_t id) {
    const uint64_t rank = rank_of(logit, id);
    if (interval.holds(row, logit, rank)) memory.list[atomicAdd(&memory.list_count, 1u)] = rank;
  });
  __syncthreads();
  sort_list(memory);
}

/** The first token of the sorted list at which before + (count or mass) reaches target. */
__device__ inline Selection find_in_list(const LogitRow& row, SelectMemory& memory, uint64_t target,
                                         bool is_by_mass) {
  const bool is_listed = threadIdx.x < memory.list_count;
  const uint64_t rank = memory.list[threadIdx.x];
  const uint64_t mass = is_listed ? row.mass(row.logits[id_of_rank(rank)]) : 0;
  const uint64_t mass_here = memory.mass_before + block_exclusive_sum(mass, memory.partials);
  const uint64_t before = is_by_mass ? mass_here : memory.count_before + threadIdx.x;
  const uint64_t after = before + (is_by_mass ? mass : 1);
  __syncthreads();
  if (is_listed && before < target && target <= after) {
    memory.last_rank = rank;
    memory.total_mass = mass_here + mass;
  }
  __syncthreads();
  return {memory.last_rank, memory.total_mass};
}

/** The likeliest tokens whose number (or mass) first reaches target, 1 to the row's size (or total mass). All
 * threads. */
__device__ inline Selection select_likeliest(const LogitRow& row, SelectMemory& memory, uint64_t target,
                                             bool is_by_mass) {
  count_bins(row, memory, [&](float logit, uint64_t) { return Interval::bin_of(row, logit); });
  find_bin(memory, target, is_by_mass, 0, 0);
  Interval interval{memory.bin};
  while (memory.counts[memory.bin] > list_capacity) {
    const uint64_t count_before = memory.count_before;
    const uint64_t mass_before = memory.mass_before;
    count_bins(row, memory, [&](float logit, uint64_t rank) {
      return interval.holds(row, logit, rank) ? interval.digit_of(rank) : bin_count;
    });
    find_bin(memory, target, is_by_mass, count_before, mass_before);
    interval = interval.part(memory.bin);
  }
  list_interval(row, memory, interval);
  return find_in_list(row, memory, target, is_by_mass);
}

}  // namespace kvs
