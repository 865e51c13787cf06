// How a skinny product is divided among thread blocks, warps and shared memory: by the sizes alone.

#pragma once

#include "skinny-params.cuh"

namespace kvs {

/** False: these kernels cannot do it. */
bool plan_skinny(SkinnyParams& params, const SkinnyProduct& product, const SkinnyDevice& device);

}  // namespace kvs
