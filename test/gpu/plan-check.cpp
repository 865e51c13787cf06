// How products of few rows are divided among thread blocks and warps, checked on the CPU: for shapes and GPUs drawn at
// random every output meets every unit of K once, and shared memory suffices; of stream-K products, each part of a tile
// is finished by one block, from what all others left for it; of a prompt's gate and up, each tile is taken once. And
// FP8 weights lie as the tensor cores' lanes want them. Needs CUDA's headers, no GPU: see .ci/run. Argument: the seed.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "../../sidecar/native/cuda/launch.cuh"

static int min(int a, int b) { return a < b ? a : b; }

// What a kernel finds there; here the check sets it.
static dim3 block_now, grid_now;
static unsigned warp_now;
#define blockIdx block_now
#define gridDim grid_now
#define threadIdx uint3{warp_now * 32, 0, 0}

#include "../../sidecar/native/cuda/fp8-order.h"
#include "../../sidecar/native/cuda/prompt-schedule.cuh"
#include "../../sidecar/native/cuda/skinny-plan.cu"
#include "../../sidecar/native/cuda/stream-k-division.cuh"

namespace {

using kvs::BlockWork;
using kvs::SkinnyParams;
using kvs::WarpPlace;

struct Gpu {
  int compute_capability;
  int shared_bytes;  // of a thread block
};
constexpr Gpu gpus[] = {{80, 163 << 10}, {86, 99 << 10}, {89, 99 << 10}, {90, 227 << 10}, {120, 99 << 10}};

/** One more for each (output, unit of K) that a warp multiplies, in the order of multiply_tiles. */
void count_warp(const SkinnyParams& p, std::vector<uint8_t>& times) {
  const BlockWork work(p);
  const WarpPlace place(p);
  for (int pass = 0; pass < p.passes; ++pass) {
    const int tile = place.tile_of(p, pass);
    if (tile >= work.tiles) return;
    const kvs::TileOutputs outputs = work.outputs(p, tile);
    for (int i = 0; i < work.chunks; ++i) {
      const int chunk = work.chunk(i);
      for (int unit = place.part; unit < work.chunk_units(p, chunk); unit += p.sharing) {
        const int k = work.k_begin + chunk * p.chunk_units + unit;
        for (int n = 0; n < 8; ++n) {
          if (outputs.low + n < p.outputs) ++times[(outputs.low + n) * p.k_units + k];
          if (outputs.has_high && outputs.high + n < p.outputs) ++times[(outputs.high + n) * p.k_units + k];
        }
      }
    }
  }
}

bool is_each_once(const SkinnyParams& p) {
  std::vector<uint8_t> times(static_cast<size_t>(p.outputs) * p.k_units, 0);
  grid_now = dim3(p.slice_blocks, p.slices);
  for (block_now.y = 0; block_now.y < grid_now.y; ++block_now.y) {
    for (block_now.x = 0; block_now.x < grid_now.x; ++block_now.x) {
      for (warp_now = 0; warp_now < kvs::skinny_warps; ++warp_now) count_warp(p, times);
    }
  }
  for (const uint8_t time : times) {
    if (time != 1) return false;
  }
  return true;
}

/** What has happened to a stream-K product's tiles, block by block. */
class StreamKRun {
 public:
  StreamKRun(int tiles, int pieces, int blocks, int parts) : parts_(parts) {
    p_.pieces = pieces;
    p_.total = tiles * pieces;
    grid_now = dim3(std::min(blocks, p_.total));
  }

  bool is_right() {
    for (block_now = dim3(0); block_now.x < grid_now.x; ++block_now.x) take_share();
    // Whoever finishes a part adds what each of the others left of it.
    for (block_now = dim3(0); block_now.x < grid_now.x; ++block_now.x) add_up();
    const size_t all_parts = static_cast<size_t>(p_.total / p_.pieces) * parts_;
    return is_right_ && finished_.size() == all_parts && left_.empty() && done_ == p_.total;
  }

 private:
  using Part = std::pair<int, int>;  // (tile, part), or (slot, part)

  template <typename Use>
  void for_each_segment(Use use) const {
    const kvs::StreamKShares shares(p_.total);
    const int end = shares.begin(block_now.x + 1);
    for (int at = shares.begin(block_now.x); at < end;) {
      const kvs::StreamKSegment segment(p_, shares, at / p_.pieces, parts_);
      const int until = std::min(end, segment.end);
      use(segment, until - at);
      at = until;
    }
  }

  void take_share() {
    for_each_segment([&](const kvs::StreamKSegment& segment, int pieces) {
      done_ += pieces;
      is_right_ &= pieces > 0 && (pieces == p_.pieces) == segment.is_whole();
      for (int part = 0; part < parts_; ++part) {
        if (segment.has(part)) {
          is_right_ &= finished_.insert({{segment.tile, part}, static_cast<int>(block_now.x)}).second;
        } else {
          is_right_ &= left_.insert({{segment.slot_of(block_now.x), part}, segment.tile}).second;
        }
      }
    });
  }

  void add_up() {
    for_each_segment([&](const kvs::StreamKSegment& segment, int) {
      if (segment.is_whole()) return;
      for (int part = segment.part_begin; part < segment.part_end; ++part) {
        for (int other = segment.first_block; other <= segment.last_block; ++other) {
          if (other == static_cast<int>(block_now.x)) continue;
          const auto found = left_.find({segment.slot_of(other), part});
          is_right_ &= found != left_.end() && found->second == segment.tile;
          if (found != left_.end()) left_.erase(found);
        }
      }
    });
  }

  const int parts_;
  kvs::StreamKParams p_{};
  bool is_right_ = true;
  int done_ = 0;                  // pieces
  std::map<Part, int> finished_;  // by (tile, part): the block
  std::map<Part, int> left_;      // by (slot, part), not yet added: the tile
};

/** Each half of each tile once, and tiles over the whole matrix. */
bool is_schedule_right(int rows, int outputs, int cluster, int clusters) {
  constexpr int half_outputs = kvs::prompt_tile_outputs / 2;
  const kvs::PromptSchedule schedule(rows, outputs, cluster, clusters);
  const int halves = schedule.output_tiles * 2;
  std::vector<int> seen(static_cast<size_t>(schedule.row_tiles) * halves);
  for (int at = 0; at < schedule.units; ++at) {
    const kvs::PromptUnit unit = schedule.unit(at);
    const int half = unit.output / half_outputs;
    const int count = unit.is_half ? 1 : 2;
    if (unit.row_tile < 0 || unit.row_tile >= schedule.row_tiles || half < 0 || half + count > halves) return false;
    if (unit.output % half_outputs != 0 || (!unit.is_half && half % 2 != 0)) return false;
    for (int i = 0; i < count; ++i) ++seen[(half + i) * schedule.row_tiles + unit.row_tile];
  }
  for (const int times : seen) {
    if (times != 1) return false;
  }
  return schedule.row_tiles * cluster * kvs::prompt_tile_rows >= rows && halves * half_outputs >= outputs;
}

/** Of a k16 step lane 4 g + q of the wide operand holds columns 2 q and 2 q + 1 of the lower eight and of the upper:
 * each pair in the same byte of a word's two halves, the steps' words one behind the other. */
bool is_fp8_order_right() {
  for (uint32_t block = 0; block < 3; ++block) {
    for (uint32_t i = 0; i < kvs::fp8_block; ++i) {
      const uint32_t q = i / 16, step = i / 4 % 4, byte = i % 4;
      const uint32_t upper_eight = byte % 2, of_pair = byte / 2;
      const uint32_t col = block * kvs::fp8_block + step * 16 + upper_eight * 8 + q * 2 + of_pair;
      if (kvs::fp8_place(col) != block * kvs::fp8_block + i) return false;
    }
    // Eight lanes with eight columns each store eights of bytes: those of the lane's own half, of two steps.
    for (uint32_t lane = 0; lane < 8; ++lane) {
      const uint32_t first = kvs::fp8_eight_place(block * kvs::fp8_block + lane * 8);
      const uint32_t step = lane / 2, q = lane % 2 * 2 + step % 2;
      const uint32_t col = block * kvs::fp8_block + step / 2 * 32 + q * 2;
      if (kvs::fp8_place(col) != first || kvs::fp8_place(col + 16 + 9) != first + 7) return false;
    }
  }
  return kvs::fp8_row_bytes(64) == 64 && kvs::fp8_row_bytes(80) == 128;
}

}  // namespace

int main(int argument_count, char** arguments) {
  const uint64_t seed = argument_count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device{}();
  std::printf("SEED=%llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const auto draw = [&](uint32_t from, uint32_t to) {
    return from + static_cast<uint32_t>(random() % (to - from + 1));
  };
  constexpr int cases = 20000;
  int served = 0, gated = 0, sliced = 0, failures = 0;
  for (int i = 0; i < cases; ++i) {
    const Gpu& gpu = gpus[draw(0, std::size(gpus) - 1)];
    const kvs::SkinnyDevice device{nullptr, nullptr, static_cast<int>(draw(1, 170)), gpu.compute_capability};
    kvs::SkinnyProduct product{};
    product.x_dtype = product.y_dtype = KVS_BF16;
    product.weight_dtype = random() % 2 == 0 ? kvs_dtype{KVS_BF16} : kvs_dtype{KVS_F8E4M3};
    product.rows = draw(1, 16);
    product.inputs = 64 * (random() % 4 == 0 ? draw(64, 256) : draw(1, 64));
    product.outputs = random() % 2 == 0 ? 16 * draw(1, 200) : draw(1, 3000);
    if (random() % 3 == 0) product.gated = &product;  // compared with null alone
    SkinnyParams p;
    if (!kvs::plan_skinny(p, product, device)) continue;
    ++served;
    gated += product.gated != nullptr ? 1 : 0;
    sliced += p.slices > 1 ? 1 : 0;
    const int shared_bytes = kvs::skinny_warps * p.stages * p.loads * 1024 + p.x_bytes + 512;
    const bool fits = shared_bytes <= gpu.shared_bytes && p.stages >= 2;
    if (fits && is_each_once(p)) continue;
    ++failures;
    std::printf("FAILED sm_%d, %d multiprocessors: %u rows, %u x %u, dtype %u%s: %s\n", gpu.compute_capability,
                device.sm_count, product.rows, product.outputs, product.inputs, product.weight_dtype,
                product.gated != nullptr ? ", gated" : "", fits ? "not each once" : "no room");
  }
  std::printf("%d of %d served, %d of them gated, %d in slices: %d failures\n", served, cases, gated, sliced, failures);
  constexpr int stream_k_cases = 5000;
  for (int i = 0; i < stream_k_cases; ++i) {
    const int tiles = static_cast<int>(draw(1, 300));
    const int pieces = static_cast<int>(draw(1, 120));
    const int blocks = static_cast<int>(random() % 4 == 0 ? draw(1, 4) : draw(1, 170));
    const int parts = 2 * static_cast<int>(draw(1, 4));
    if (StreamKRun(tiles, pieces, blocks, parts).is_right()) continue;
    ++failures;
    std::printf("FAILED stream-K: %d tiles of %d pieces, %d blocks, %d parts\n", tiles, pieces, blocks, parts);
  }
  std::printf("%d stream-K products: %d failures\n", stream_k_cases, failures);
  for (int i = 0; i < cases; ++i) {
    const int rows = static_cast<int>(draw(1, 4000)), outputs = static_cast<int>(16 * draw(1, 700));
    const int cluster = static_cast<int>(draw(1, 2)), clusters = static_cast<int>(draw(1, 140));
    if (is_schedule_right(rows, outputs, cluster, clusters)) continue;
    ++failures;
    std::printf("FAILED prompt: %d rows, %d outputs, %d clusters of %d\n", rows, outputs, clusters, cluster);
  }
  std::printf("%d schedules of prompts: %d failures\n", cases, failures);
  const bool is_order_right = is_fp8_order_right();
  std::printf("the order of FP8 weights: %s\n", is_order_right ? "right" : "WRONG");
  return failures == 0 && gated > 0 && sliced > 0 && is_order_right ? 0 : 1;
}
