// The copy engine moves slices at the speed of the bus and costs the multiprocessors nothing; small ones it starts
// too slowly, and there a kernel of two blocks is faster: copy-choice.h. test/gpu/copy-bench.cu measures all of them.

#include <algorithm>

#include "arena-registration.h"
#include "cuda-error.h"
#include "layer-copy.h"

namespace kvs {

namespace {

/** Neighbours as rows of a matrix are as fast as one copy of all (34 GB/s even at 4 KiB), if there are some. */
constexpr uint32_t neighbours_min = 8;

constexpr uint32_t kernel_threads = 1024;
constexpr uint32_t kernel_blocks = 2;
constexpr uint32_t loads_in_flight = 4;
/** Index pairs that fit the parameters of a launch. */
constexpr uint32_t pairs_max = 448;

struct Gather {
  const char* from;
  char* to;
  uint64_t stride_bytes;
  uint32_t slice_vectors;  // of 16 bytes
  uint32_t count;
  int32_t from_index[pairs_max];
  int32_t to_index[pairs_max];
};

/** Blocks take turns at tiles of 64 KiB; loads from the host are all under way before the first is stored. */
__global__ void __launch_bounds__(kernel_threads) gather_kernel(const __grid_constant__ Gather g) {
  constexpr uint32_t tile = kernel_threads * loads_in_flight;
  const uint32_t tiles_per_slice = (g.slice_vectors + tile - 1) / tile;
  for (uint32_t t = blockIdx.x; t < tiles_per_slice * g.count; t += gridDim.x) {
    const uint32_t slice = t / tiles_per_slice;
    const uint32_t begin = t % tiles_per_slice * tile + threadIdx.x;
    const int4* from =
        reinterpret_cast<const int4*>(g.from + static_cast<uint64_t>(g.from_index[slice]) * g.stride_bytes);
    int4* to = reinterpret_cast<int4*>(g.to + static_cast<uint64_t>(g.to_index[slice]) * g.stride_bytes);
    int4 values[loads_in_flight];
#pragma unroll
    for (uint32_t k = 0; k < loads_in_flight; ++k) {
      const uint32_t i = begin + k * kernel_threads;
      if (i < g.slice_vectors) values[k] = __ldcs(from + i);
    }
#pragma unroll
    for (uint32_t k = 0; k < loads_in_flight; ++k) {
      const uint32_t i = begin + k * kernel_threads;
      if (i < g.slice_vectors) __stcs(to + i, values[k]);
    }
  }
}

void copy_by_kernel(const LayerCopy& copy, cudaStream_t stream) {
  Gather g;
  g.from = copy.is_load ? copy.host : copy.device;
  g.to = copy.is_load ? copy.device : copy.host;
  g.stride_bytes = copy.stride_bytes;
  g.slice_vectors = static_cast<uint32_t>(copy.bytes / 16);
  for (uint32_t done = 0; done < copy.count; done += pairs_max) {
    g.count = std::min(pairs_max, copy.count - done);
    std::copy_n((copy.is_load ? copy.slots : copy.blocks) + done, g.count, g.from_index);
    std::copy_n((copy.is_load ? copy.blocks : copy.slots) + done, g.count, g.to_index);
    gather_kernel<<<kernel_blocks, kernel_threads, 0, stream>>>(g);
    check_launch("layer copy");
  }
}

char* slice(char* base, const LayerCopy& copy, int32_t index) {
  return base + static_cast<uint64_t>(index) * copy.stride_bytes;
}

/** End of the neighbours that begin at `begin`: both slots and blocks rise by one, in one page-locked piece. */
uint32_t run_end(const LayerCopy& copy, uint32_t begin) {
  const int32_t piece_slots = static_cast<int32_t>(arena_piece_slots(copy.stride_bytes));
  uint32_t end = begin + 1;
  while (end < copy.count && copy.slots[end] == copy.slots[end - 1] + 1 && copy.slots[end] % piece_slots != 0 &&
         copy.blocks[end] == copy.blocks[end - 1] + 1) {
    ++end;
  }
  return end;
}

void copy_by_rows(const LayerCopy& copy, cudaStream_t stream) {
  for (uint32_t begin = 0, end; begin < copy.count; begin = end) {
    end = run_end(copy, begin);
    char* host = slice(copy.host, copy, copy.slots[begin]);
    char* device = slice(copy.device, copy, copy.blocks[begin]);
    check_cuda(cudaMemcpy2DAsync(copy.is_load ? device : host, copy.stride_bytes, copy.is_load ? host : device,
                                 copy.stride_bytes, copy.bytes, end - begin,
                                 copy.is_load ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, stream),
               "layer copy");
  }
}

void copy_by_engine(const LayerCopy& copy, cudaStream_t stream) {
  thread_local std::vector<void*> to;
  thread_local std::vector<void*> from;
  thread_local std::vector<size_t> sizes;
  to.resize(copy.count);
  from.resize(copy.count);
  sizes.assign(copy.count, copy.bytes);
  for (uint32_t i = 0; i < copy.count; ++i) {
    void* host = slice(copy.host, copy, copy.slots[i]);
    void* device = slice(copy.device, copy, copy.blocks[i]);
    to[i] = copy.is_load ? device : host;
    from[i] = copy.is_load ? host : device;
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaMemcpyBatchAsync(const_cast<const void**>(to.data()), const_cast<const void**>(from.data()), sizes.data(),
                           copy.count, &attributes, &first, 1, stream);
#else
  size_t failed = 0;
  const cudaError_t error =
      cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), copy.count, &attributes, &first, 1, &failed, stream);
#endif
  check_cuda(error, "layer copy");
}

}  // namespace

CopyMethod method_for(const LayerCopy& copy, CopyMethod scattered) {
  uint32_t runs = 0;
  for (uint32_t begin = 0; begin < copy.count; begin = run_end(copy, begin)) ++runs;
  return copy.count >= runs * neighbours_min ? CopyMethod::rows : scattered;
}

void copy_layer(const LayerCopy& copy, CopyMethod method, cudaStream_t stream) {
  switch (method) {
    case CopyMethod::rows: return copy_by_rows(copy, stream);
    case CopyMethod::kernel: return copy_by_kernel(copy, stream);
    case CopyMethod::engine: return copy_by_engine(copy, stream);
  }
}

}  // namespace kvs
