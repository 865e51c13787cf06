// One load a thread and as many threads as there are words: what counts is the way over the bus, gone once.

#include "cuda-error.h"
#include "host-read.h"

namespace kvs {

namespace {

constexpr uint32_t threads = 256;

template <class Word>
__global__ void __launch_bounds__(threads) read_kernel(Word* to, const Word* from, uint32_t words) {
  const uint32_t i = blockIdx.x * threads + threadIdx.x;
  if (i < words) to[i] = __ldcv(from + i);
}

template <class Word>
void launch_read(void* destination, const void* source, uint64_t bytes, cudaStream_t stream) {
  const uint32_t words = static_cast<uint32_t>(bytes / sizeof(Word));
  read_kernel<<<(words + threads - 1) / threads, threads, 0, stream>>>(static_cast<Word*>(destination),
                                                                       static_cast<const Word*>(source), words);
  check_launch("read of host memory");
}

}  // namespace

void read_host(void* destination, const void* source, uint64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  const uint64_t low_bits = reinterpret_cast<uint64_t>(destination) | reinterpret_cast<uint64_t>(source) | bytes;
  if (low_bits % sizeof(int4) == 0) {
    launch_read<int4>(destination, source, bytes, stream);
  } else {
    launch_read<int32_t>(destination, source, bytes, stream);
  }
}

}  // namespace kvs
