// Angles grow to a million radians: in float their cosines would be noise.

#include "cuda-error.h"
#include "rope-table.h"

namespace kvs {

namespace {

__global__ void rope_table_kernel(float* cosine, float* sine, const double* inverse_frequencies, uint64_t count,
                                  uint32_t pairs) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    double s;
    double c;
    sincos(static_cast<double>(i / pairs) * inverse_frequencies[i % pairs], &s, &c);
    cosine[i] = static_cast<float>(c);
    sine[i] = static_cast<float>(s);
  }
}

}  // namespace

void fill_rope_table(float* cosine, float* sine, const double* inverse_frequencies, uint32_t positions,
                     uint32_t pairs, cudaStream_t stream) {
  rope_table_kernel<<<1024, 256, 0, stream>>>(cosine, sine, inverse_frequencies,
                                              static_cast<uint64_t>(positions) * pairs, pairs);
  check_launch("rope_table");
}

}  // namespace kvs
