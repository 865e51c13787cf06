// Where the likeliest tokens of a row end: the token at which their number, or their mass, reaches a target. A
// histogram over the distance to the likeliest logit finds the interval in which that happens; what lies in it is
// sorted. Intervals that hold too much (flat or far away) are cut further by the bits of the rank, which are unique.
//
// Every block of a team counts its share; totals, searches and sorts are then the same work in each of them.

#pragma once

#include "block-scan.cuh"
#include "sample-row.cuh"
#include "sample-team.cuh"

namespace kvs {

inline constexpr uint32_t bin_count = 2 * scan_threads;
/** In units of e^-1: the last bin holds what is less likely than the first by e^-32. */
inline constexpr float bins_per_unit = 64.0f;
inline constexpr uint32_t list_capacity = scan_threads;
inline constexpr uint32_t digit_bits = 11;  // of bin_count

struct SelectMemory {
  // Of this block's share; other members read them.
  uint64_t list[list_capacity];  // ranks
  uint64_t mass;
  uint32_t list_count;
  uint32_t counts[bin_count];
  uint32_t masses_low[bin_count];
  uint32_t masses_high[bin_count];
  uint32_t token;  // of the first member: what another one found
  // Of all, the same in every block.
  uint64_t gathered[list_capacity];  // ranks, ascending
  uint32_t gathered_count;
  uint32_t bin;
  uint32_t count_in_bin;
  uint64_t count_before;
  uint64_t mass_before;
  uint64_t total_mass;
  uint64_t last_rank;
  uint64_t selected_mass;
  uint64_t partials[32];
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
__device__ void count_bins(const LogitRow& row, const Team& team, SelectMemory& memory, const Bin& bin_or_skip) {
  team.sync();
  for (uint32_t i = threadIdx.x; i < bin_count; i += scan_threads) {
    memory.counts[i] = 0;
    memory.masses_low[i] = 0;
    memory.masses_high[i] = 0;
  }
  __syncthreads();
  for_logits(row.logits, row.begin, row.end, threadIdx.x, scan_threads, [&](float logit, uint32_t id) {
    const uint32_t bin = bin_or_skip(logit, rank_of(logit, id));
    if (bin == bin_count) return;
    atomicAdd(&memory.counts[bin], 1u);
    const uint32_t mass = row.mass(logit);
    // Shared memory adds 32 bits at once; the carry is rare.
    if (mass != 0 && atomicAdd(&memory.masses_low[bin], mass) > ~mass) atomicAdd(&memory.masses_high[bin], 1u);
  });
  team.sync();
}

/** The distance bins of the whole row. */
__device__ inline void count_distances(const LogitRow& row, const Team& team, SelectMemory& memory) {
  count_bins(row, team, memory, [&](float logit, uint64_t) { return Interval::bin_of(row, logit); });
}

/** Finds the bin in which before + (counts or masses) reaches target; what comes before it goes to memory. */
__device__ inline void find_bin(const Team& team, SelectMemory& memory, uint64_t target, bool is_by_mass,
                                uint64_t count_before, uint64_t mass_before) {
  const uint32_t first = 2 * threadIdx.x;
  uint64_t counts[2] = {0, 0};
  uint64_t masses[2] = {0, 0};
  for (uint32_t member = 0; member < team.size; ++member) {
    const SelectMemory* other = team.in(&memory, member);
#pragma unroll
    for (uint32_t k = 0; k < 2; ++k) {
      counts[k] += other->counts[first + k];
      masses[k] += static_cast<uint64_t>(other->masses_high[first + k]) << 32 | other->masses_low[first + k];
    }
  }
  uint64_t count = count_before + block_exclusive_sum(counts[0] + counts[1], memory.partials);
  __syncthreads();
  uint64_t mass = mass_before + block_exclusive_sum(masses[0] + masses[1], memory.partials);
  if (threadIdx.x == scan_threads - 1) memory.total_mass = mass + masses[0] + masses[1];
  for (uint32_t k = 0; k < 2; ++k) {
    const uint64_t before = is_by_mass ? mass : count;
    const uint64_t after = before + (is_by_mass ? masses[k] : counts[k]);
    if (before < target && target <= after) {
      memory.bin = first + k;
      memory.count_in_bin = static_cast<uint32_t>(counts[k]);
      memory.count_before = count;
      memory.mass_before = mass;
    }
    count += counts[k];
    mass += masses[k];
  }
  __syncthreads();
}

/** Bitonic sort of memory.gathered, ascending. */
__device__ inline void sort_gathered(SelectMemory& memory) {
  const uint32_t i = threadIdx.x;
  uint32_t size = 2;
  while (size < memory.gathered_count) size *= 2;
  if (i >= memory.gathered_count) memory.gathered[i] = ~0ull;
  for (uint32_t width = 2; width <= size; width *= 2) {
    for (uint32_t step = width / 2; step > 0; step /= 2) {
      __syncthreads();
      const uint32_t other = i ^ step;
      if (other <= i || other >= size) continue;
      const uint64_t a = memory.gathered[i];
      const uint64_t b = memory.gathered[other];
      if ((a > b) == ((i & width) == 0)) {
        memory.gathered[i] = b;
        memory.gathered[other] = a;
      }
    }
  }
  __syncthreads();
}

/** The ranks of all shares for which is_wanted(logit, rank), sorted; they must fit. */
template <class Wanted>
__device__ void gather_ranks(const LogitRow& row, const Team& team, SelectMemory& memory, const Wanted& is_wanted) {
  team.sync();
  if (threadIdx.x == 0) memory.list_count = 0;
  __syncthreads();
  for_logits(row.logits, row.begin, row.end, threadIdx.x, scan_threads, [&](float logit, uint32_t id) {
    const uint64_t rank = rank_of(logit, id);
    if (is_wanted(logit, rank)) memory.list[atomicAdd(&memory.list_count, 1u)] = rank;
  });
  team.sync();
  uint32_t total = 0;
  for (uint32_t member = 0; member < team.size; ++member) {
    const SelectMemory* other = team.in(&memory, member);
    const uint32_t count = other->list_count;
    if (threadIdx.x < count) memory.gathered[total + threadIdx.x] = other->list[threadIdx.x];
    total += count;
  }
  if (threadIdx.x == 0) memory.gathered_count = total;
  __syncthreads();
  sort_gathered(memory);
}

/** Finds the first token of the sorted ranks at which before + (count or mass) reaches target. */
__device__ inline void find_rank(const LogitRow& row, SelectMemory& memory, uint64_t target, bool is_by_mass) {
  const bool is_listed = threadIdx.x < memory.gathered_count;
  const uint64_t rank = memory.gathered[threadIdx.x];
  const uint64_t mass = is_listed ? row.mass(row.logits[id_of_rank(rank)]) : 0;
  const uint64_t mass_here = memory.mass_before + block_exclusive_sum(mass, memory.partials);
  const uint64_t before = is_by_mass ? mass_here : memory.count_before + threadIdx.x;
  const uint64_t after = before + (is_by_mass ? mass : 1);
  __syncthreads();
  if (is_listed && before < target && target <= after) {
    memory.last_rank = rank;
    memory.selected_mass = mass_here + mass;
  }
  __syncthreads();
}

/**
 * The likeliest tokens whose number (or mass) first reaches target, 1 to the row's size (or total mass): up to
 * memory.last_rank, with memory.selected_mass. The distances were counted; false: they must be counted again before
 * the next search.
 */
__device__ inline bool select_likeliest(const LogitRow& row, const Team& team, SelectMemory& memory, uint64_t target,
                                        bool is_by_mass) {
  find_bin(team, memory, target, is_by_mass, 0, 0);
  Interval interval{memory.bin};
  bool are_distances_kept = true;
  while (memory.count_in_bin > list_capacity) {
    const uint64_t count_before = memory.count_before;
    const uint64_t mass_before = memory.mass_before;
    count_bins(row, team, memory, [&](float logit, uint64_t rank) {
      return interval.holds(row, logit, rank) ? interval.digit_of(rank) : bin_count;
    });
    find_bin(team, memory, target, is_by_mass, count_before, mass_before);
    interval = interval.part(memory.bin);
    are_distances_kept = false;
  }
  gather_ranks(row, team, memory, [&](float logit, uint64_t rank) { return interval.holds(row, logit, rank); });
  find_rank(row, memory, target, is_by_mass);
  return are_distances_kept;
}

}  // namespace kvs
