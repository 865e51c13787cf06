// How K is sliced, outputs are dealt and shared memory is used: the division whose busiest multiprocessor has least to
// do, as an H200 has shown it.

#include "skinny-plan.h"

#include <algorithm>

#include "launch.cuh"

namespace kvs {
namespace {

constexpr int slices_max = 8;
constexpr int counters_max = 1024;          // of thread blocks of a slice
constexpr int sliced_floats_max = 4 << 20;  // partials
constexpr int static_shared_bytes = 512;
constexpr int stages_max = 4;
constexpr int chunk_bytes_min = 16 << 10;    // of all rows of x
constexpr uint64_t ahead_enough = 64 << 10;  // bytes of a multiprocessor on their way: more are not faster

bool is_fp8(const SkinnyProduct& product) { return product.weight_dtype == KVS_F8E4M3; }
int unit_bytes_of(const SkinnyParams& p) { return p.loads * 2 * 512; }
int unit_values_of(const SkinnyParams& p, const SkinnyProduct& product) {
  return p.loads * (is_fp8(product) ? 64 : 32);
}
int x_padding(const SkinnyProduct& product) { return is_fp8(product) ? 16 : 64; }
int items_of_busiest(const SkinnyParams& p) { return p.items_each + (p.items_extra > 0 ? 1 : 0); }

void plan_division(SkinnyParams& p, const SkinnyProduct& product, const SkinnyDevice& device, int slices, int loads) {
  p.slices = slices;
  p.loads = loads;
  p.k_units = p.inputs / unit_values_of(p, product);
  p.slice_blocks = std::max(1, std::min(device.sm_count / slices, p.items));
  p.items_each = p.items / p.slice_blocks;
  p.items_extra = p.items % p.slice_blocks;
  const int items = items_of_busiest(p);
  const int tiles = product.gated != nullptr ? items : (items + 1) / 2;
  p.passes = (tiles + skinny_warps - 1) / skinny_warps;
  p.pass_tiles = (tiles + p.passes - 1) / p.passes;
  p.sharing = skinny_warps / p.pass_tiles;
  const int slice_units = (p.k_units + slices - 1) / slices;
  const int row_bytes = slice_units * unit_values_of(p, product) * 2;
  const int chunks = std::clamp(p.rows * row_bytes / chunk_bytes_min, 1, skinny_chunks_max);
  const int rounds = (slice_units + chunks * p.sharing - 1) / (chunks * p.sharing);
  p.chunk_units = std::min(slice_units, p.sharing * rounds);
  p.x_bytes = p.rows * (row_bytes + x_padding(product));
  const int room = shared_bytes_per_block(device.compute_capability) - static_shared_bytes - p.x_bytes;
  p.stages = std::min(stages_max, std::max(0, room) / (skinny_warps * unit_bytes_of(p)));
}

/** 16-bit weights for more than 8 rows of x: in slices, or with less ahead than this, the library is as fast. */
bool is_left_to_library(const SkinnyParams& p, const SkinnyProduct& product) {
  return !is_fp8(product) && p.rows > 8 && (p.slices > 1 || p.stages < 3);
}

/** Bytes that the busiest SM moves, the rest of its cost in bytes' worth of time; 0: it is not done like this. */
uint64_t cost(const SkinnyParams& p, const SkinnyProduct& product) {
  if (p.inputs % unit_values_of(p, product) != 0 || p.k_units < p.slices || p.stages < 2) return 0;
  if (is_left_to_library(p, product)) return 0;
  const uint64_t outputs = static_cast<uint64_t>(items_of_busiest(p)) * (product.gated != nullptr ? 16 : 8);
  const uint64_t values = (p.k_units + p.slices - 1) / p.slices * unit_values_of(p, product);
  const uint64_t bytes = outputs * values * (is_fp8(product) ? 1 : 2);
  const uint64_t ahead = static_cast<uint64_t>(p.stages - 1) * skinny_warps * unit_bytes_of(p);
  // Shorter pieces of a row, or few on their way, come more slowly.
  const uint64_t weight = bytes + (p.loads < 4 ? bytes / 64 : 0) + (ahead < ahead_enough ? bytes / 32 : 0);
  const uint64_t x = product.rows * values * 2;
  if (p.slices == 1) return weight + x * 3 / 4;
  // Gates want finished sums.
  if (product.gated != nullptr || p.slice_blocks > counters_max) return 0;
  if (static_cast<uint64_t>(p.slices) * p.eights * 8 * product.rows > sliced_floats_max) return 0;
  return weight + x * 3 / 4 + outputs * product.rows * 8 + (4 + p.slices) * 10240;
}

bool has_served_types(const SkinnyProduct& product) {
  const bool is_half = product.x_dtype == KVS_BF16 || product.x_dtype == KVS_F16;
  return is_half && (is_fp8(product) || product.weight_dtype == product.x_dtype) &&
         (product.y_dtype == KVS_F32 || (product.y_dtype == product.x_dtype && !product.is_accumulating));
}

bool has_served_gate(const SkinnyProduct& product) {
  if (product.gated == nullptr) return true;
  const uint64_t half_bytes = static_cast<uint64_t>(product.outputs) / 2 * product.inputs * 2;
  return product.outputs % 16 == 0 && half_bytes < (1ull << 31) && product.y_dtype == product.x_dtype;
}

}  // namespace

bool plan_skinny(SkinnyParams& params, const SkinnyProduct& product, const SkinnyDevice& device) {
  if (product.rows == 0 || product.rows > skinny_rows_max || device.compute_capability < 80 ||
      !has_served_types(product) || !has_served_gate(product)) {
    return false;
  }
  SkinnyParams p = {};
  p.y = product.y;
  p.x = product.x;
  p.weight = product.weight;
  p.scales = is_fp8(product) ? product.scales : nullptr;
  p.bias = product.bias;
  p.gated = product.gated;
  p.is_accumulating = product.is_accumulating;
  p.is_f32_out = product.y_dtype == KVS_F32;
  p.counters = static_cast<int*>(device.workspace);
  p.partials = reinterpret_cast<float*>(p.counters + counters_max);
  p.rows = static_cast<int>(product.rows);
  p.outputs = static_cast<int>(product.outputs);
  p.inputs = static_cast<int>(product.inputs);
  p.eights = (p.outputs + 7) / 8;
  p.items = product.gated != nullptr ? p.eights / 2 : p.eights;
  uint64_t least = 0;
  for (const int loads : {4, 2}) {
    for (int slices = 1; slices <= slices_max; ++slices) {
      plan_division(p, product, device, slices, loads);
      const uint64_t now = cost(p, product);
      if (now == 0 || (least != 0 && now >= least)) continue;
      params = p;
      least = now;
    }
  }
  return least != 0;
}

uint64_t skinny_workspace_bytes() { return counters_max * 4 + sliced_floats_max * 4ull; }

bool skinny_supports(const SkinnyProduct& product, const SkinnyDevice& device) {
  SkinnyParams p;
  return plan_skinny(p, product, device);
}

}  // namespace kvs
