// How a skinny product is divided among thread blocks, warps and shared memory: by its sizes, its types and the GPU's.

#pragma once

#include "skinny-params.cuh"

namespace kvs {

/** False: these kernels cannot do it, or would not be faster than the library; params is not touched then. */
bool plan_skinny(SkinnyParams& params, const SkinnyProduct& product, const SkinnyDevice& device);

}  // namespace kvs
