// RoPE as tables of [position][pair], from angles computed in double.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kvs {

void fill_rope_table(float* cosine, float* sine, const double* inverse_frequencies, uint32_t positions,
                     uint32_t pairs, cudaStream_t stream);

}  // namespace kvs
