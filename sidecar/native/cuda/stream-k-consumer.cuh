// A stream-K product, the arithmetic: warpgroups multiply piece after piece, and what several thread blocks share of a
// tile is added up.

#pragma once

#include "skinny-weight.cuh"
#include "stream-k.cuh"
#include "unflagged-part.cuh"

namespace kvs {

// ---- products ----------------------------------------------------------------------------------------------

/** A thread's sums of a tile: of eight rows four, two rows of its lower output, then of its upper one. */
template <typename Shape>
using StreamKSums = float[Shape::parts * 4];

/** Of E4M3 weights a lane's operands of the tensor cores, four times 16 values of K. Others are multiplied where they
 * lie. */
using StreamKOperands = uint32_t[4][4];

/** Which of the eight lower rows, and which upper one, in shared memory a lane's operands and sums are of. The eight
 * lanes that load 16 bytes at once have two rows: E4M3 ones four apart, where swizzled rows share no bank. */
template <typename Shape>
__device__ __forceinline__ int row_of_lane() {
  const int group = threadIdx.x % 32 / 4;
  return Shape::is_fp8 ? group % 2 * 4 + group / 2 : group;
}

/** E4M3 weights of a piece as they lie in shared memory: of each half the lower row's and the upper one's. */
struct StreamKBytes {
  uint4 low[2];
  uint4 high[2];
};

template <typename Shape>
__device__ __forceinline__ void load_bytes(const StreamKPipeline<Shape>& pipeline, int stage, StreamKBytes& bytes) {
  const int row = row_of_lane<Shape>();
  const uint32_t from = pipeline.weight(stage, 0) + (threadIdx.x / 32 * 16 + row) * 128;  // the upper one is 8 rows on
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t chunk = from + ((half * 4 + threadIdx.x % 4) ^ row) * 16;
    bytes.low[half] = load_shared_128(chunk);
    bytes.high[half] = load_shared_128(chunk + 8 * 128);
  }
}

template <typename Shape>
__device__ __forceinline__ void make_operands(const StreamKBytes& bytes, int half, StreamKOperands& operands) {
  uint32_t low[8];
  uint32_t high[8];
  WeightChunk<typename Shape::T, true>::unpack(bytes.low[half], low);
  WeightChunk<typename Shape::T, true>::unpack(bytes.high[half], high);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    operands[k][0] = low[2 * k];
    operands[k][1] = high[2 * k];
    operands[k][2] = low[2 * k + 1];
    operands[k][3] = high[2 * k + 1];
  }
}

/** Half a piece: 64 values of K. */
template <bool is_adding, typename Shape>
__device__ __forceinline__ void multiply_half(const StreamKPipeline<Shape>& pipeline, int stage, int half,
                                              const StreamKOperands& operands, StreamKSums<Shape>& sums) {
  using T = typename Shape::T;
  const uint64_t x = tile_descriptor(pipeline.x(stage, half), 16);
  const uint64_t weight = tile_descriptor(pipeline.weight(stage, Shape::is_fp8 ? 0 : half), 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (Shape::is_fp8) {
      multiply_mixed<T>(sums, operands[k], descriptor_at(x, k * 32), is_adding || k > 0);
    } else {
      multiply_shared<T>(sums, descriptor_at(weight, k * 32), descriptor_at(x, k * 32), is_adding || k > 0);
    }
  }
}

/** One lane tells for its warp. */
template <typename Shape>
__device__ __forceinline__ void release_stage(const StreamKPipeline<Shape>& pipeline, int stage) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(pipeline.empty(stage));
}

// ---- results -----------------------------------------------------------------------------------------------

/** Where a thread's sums go: to two neighbours of y or, of a gated product, to an output of its first half and the
 * counterpart of the second. */
struct StreamKOutputs {
  int low;
  int high;

  /** within: see row_of_lane. */
  __device__ StreamKOutputs(const StreamKParams& p, int tile_sixteen, int within) {
    const int sixteen = tile_sixteen + threadIdx.x / 32;
    low = p.gated != nullptr ? sixteen * 8 + within : sixteen * 16 + within * 2;
    high = p.gated != nullptr ? p.outputs / 2 + low : low + 1;
  }
  __device__ bool are_there(const StreamKParams& p) const { return high < p.outputs; }
};

/** use(row, sums of the lower and the upper output) for each pair of the segment. */
template <typename Shape, typename Use>
__device__ __forceinline__ void for_each_pair(const StreamKParams& p, const StreamKSegment& segment,
                                              const StreamKSums<Shape>& sums, Use use) {
#pragma unroll
  for (int part = 0; part < Shape::parts; ++part) {
    if (!segment.has(part)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = part * 8 + threadIdx.x % 4 * 2 + i;
      if (row < p.rows) use(row, sums[part * 4 + i], sums[part * 4 + 2 + i]);
    }
  }
}

__device__ __forceinline__ uint64_t offset_of(const StreamKParams& p, int row, const StreamKOutputs& outputs) {
  return static_cast<uint64_t>(row) * p.outputs + outputs.low;
}

template <typename T>
__device__ __forceinline__ void store_gated(const StreamKParams& p, int row, const StreamKOutputs& outputs, float low,
                                            float high) {
  static_cast<T*>(p.gated)[static_cast<uint64_t>(row) * (p.outputs / 2) + outputs.low] =
      static_cast<T>(low / (1.0f + expf(-low)) * high);
}

/** In memory itself, once for each output: nothing waits for what was there. */
__device__ __forceinline__ void add_to_memory(float* to, float low, float high) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(low), "f"(high) : "memory");
}

template <typename T>
__device__ __forceinline__ void store_neighbours(const StreamKParams& p, int row, const StreamKOutputs& outputs,
                                                 float low, float high) {
  const uint64_t at = offset_of(p, row, outputs);
  if (p.is_accumulating) {
    add_to_memory(static_cast<float*>(p.y) + at, low, high);
  } else if (p.is_f32_out) {
    *reinterpret_cast<float2*>(static_cast<float*>(p.y) + at) = {low, high};
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + at) = pack_pair<T>(low, high);
  }
}

template <typename Shape>
__device__ __forceinline__ void store_sums(const StreamKParams& p, const StreamKSegment& segment,
                                           const StreamKOutputs& outputs, const StreamKSums<Shape>& sums) {
  using T = typename Shape::T;
  if (!outputs.are_there(p)) return;
  const float2 bias = p.bias == nullptr ? float2{0, 0} : float2{p.bias[outputs.low], p.bias[outputs.high]};
  const float2 scale = Shape::is_fp8 ? float2{p.scales[outputs.low], p.scales[outputs.high]} : float2{1, 1};
  for_each_pair<Shape>(p, segment, sums, [&](int row, float low, float high) {
    low = low * scale.x + bias.x;
    high = high * scale.y + bias.y;
    if (p.gated != nullptr) {
      store_gated<T>(p, row, outputs, low, high);
    } else {
      store_neighbours<T>(p, row, outputs, low, high);
    }
  });
}

// ---- tiles of several thread blocks ----------------------------------------------------------------------------

/** The thread's, of the block's part of the segment's tile. */
template <typename Shape>
__device__ __forceinline__ float* parts_of(const StreamKParams& p, const StreamKSegment& segment, int block) {
  const int64_t slot = segment.slot_of(block);
  return p.parts + (slot * Shape::parts * Shape::consumers + threadIdx.x) * 4;
}

/** All but those that the segment finishes. */
template <typename Shape>
__device__ __forceinline__ void leave_parts(const StreamKSegment& segment, const StreamKSums<Shape>& sums, float* to) {
#pragma unroll
  for (int part = 0; part < Shape::parts; ++part) {
    if (segment.has(part)) continue;
    const float* sum = sums + part * 4;
    leave_part(to + part * Shape::consumers * 4, float4{sum[0], sum[1], sum[2], sum[3]});
  }
}

/** Adds what another block left of the parts that the segment finishes, and puts zeros back. */
template <typename Shape>
__device__ __forceinline__ void add_parts(const StreamKSegment& segment, StreamKSums<Shape>& sums, float* from) {
  constexpr int batch = Shape::parts < 8 ? Shape::parts : 8;  // on their way at once
#pragma unroll
  for (int first = 0; first < Shape::parts; first += batch) {
    float4 values[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (!segment.has(first + i)) continue;
      values[i] = look_at_part(reinterpret_cast<const float4*>(from + (first + i) * Shape::consumers * 4));
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (!segment.has(first + i)) continue;
      float4* at = reinterpret_cast<float4*>(from + (first + i) * Shape::consumers * 4);
      while (!is_there(values[i])) values[i] = look_at_part(at);
      *at = {0, 0, 0, 0};
      float* sum = sums + (first + i) * 4;
      sum[0] += values[i].x;
      sum[1] += values[i].y;
      sum[2] += values[i].z;
      sum[3] += values[i].w;
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void share_sums(const StreamKParams& p, const StreamKSegment& segment,
                                           StreamKSums<Shape>& sums) {
  const int block = static_cast<int>(blockIdx.x);
  leave_parts<Shape>(segment, sums, parts_of<Shape>(p, segment, block));
  if (segment.part_begin == segment.part_end) return;
  for (int other = segment.first_block; other <= segment.last_block; ++other) {
    if (other == block) continue;
    add_parts<Shape>(segment, sums, parts_of<Shape>(p, segment, other));
  }
}

/** Piece after piece of a segment: products run while the operands of the next ones are made. */
template <typename Shape>
class StreamKProducts {
 public:
  __device__ StreamKProducts(const StreamKParams& p, const StreamKPipeline<Shape>& pipeline, int begin)
      : p_(p), pipeline_(pipeline), now_(p, begin) {}

  __device__ __forceinline__ int tile() const { return now_.tile; }

  __device__ __forceinline__ void run(int count, StreamKSums<Shape>& sums) {
    start<true>(sums);
    for (int i = 1; i < count; ++i) start<false>(sums);
    products_wait<0>();
    keep_in_place(sums);
    if constexpr (Shape::is_fp8) {
      keep_in_place(even_);
      keep_in_place(odd_);
    }
    release_stage(pipeline_, running_);
  }

 private:
  /** The next piece's products; those of the piece before are over then. */
  template <bool is_first>
  __device__ __forceinline__ void start(StreamKSums<Shape>& sums) {
    const int stage = now_.stage;
    mbarrier_wait(pipeline_.full(stage), now_.parity);
    if constexpr (Shape::is_fp8) {
      start_converted<is_first>(stage, sums);
    } else {
      products_begin();
      multiply_half<!is_first, Shape>(pipeline_, stage, 0, even_, sums);
      multiply_half<true, Shape>(pipeline_, stage, 1, odd_, sums);
      products_commit();
      if constexpr (!is_first) {
        products_wait<1>();
        release_stage(pipeline_, running_);
      }
    }
    running_ = stage;
    now_.advance(p_);
  }

  /** Each half is converted while the one before it is multiplied, into the registers of the one before that. */
  template <bool is_first>
  __device__ __forceinline__ void start_converted(int stage, StreamKSums<Shape>& sums) {
    StreamKBytes bytes;
    load_bytes<Shape>(pipeline_, stage, bytes);
    if constexpr (!is_first) products_wait<1>();
    keep_in_place(even_);
    make_operands<Shape>(bytes, 0, even_);
    products_begin();
    multiply_half<!is_first, Shape>(pipeline_, stage, 0, even_, sums);
    products_commit();
    if constexpr (!is_first) {
      products_wait<1>();
      release_stage(pipeline_, running_);
    }
    keep_in_place(odd_);
    make_operands<Shape>(bytes, 1, odd_);
    products_begin();
    multiply_half<true, Shape>(pipeline_, stage, 1, odd_, sums);
    products_commit();
  }

  const StreamKParams& p_;
  const StreamKPipeline<Shape>& pipeline_;
  StreamKPosition<Shape::stages> now_;
  int running_ = 0;  // stage of the products that may still run
  StreamKOperands even_ = {};
  StreamKOperands odd_ = {};
};

/** A warpgroup, over all pieces of its thread block. */
template <typename Shape>
__device__ __forceinline__ void consume(const StreamKParams& p, const StreamKShares& shares,
                                        const StreamKPipeline<Shape>& pipeline, int begin, int end) {
  StreamKProducts<Shape> products(p, pipeline, begin);
  StreamKSums<Shape> sums;
  for (int at = begin; at < end;) {
    const StreamKSegment segment(p, shares, products.tile(), Shape::parts);
    const StreamKOutputs outputs(p, segment.tile * (Shape::tile_outputs / 16), row_of_lane<Shape>());
    const int count = min(end, segment.end) - at;
    products.run(count, sums);
    at += count;
    if (!segment.is_whole()) share_sums<Shape>(p, segment, sums);
    store_sums<Shape>(p, segment, outputs, sums);
  }
}

}  // namespace kvs
