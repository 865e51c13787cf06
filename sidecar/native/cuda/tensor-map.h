// Tensor maps: how the tensor copy engine (sm_90 and later) finds the boxes of a matrix, their columns swizzled by 128
// bytes as the tensor cores want them.

#pragma once

#include <cuda.h>

#include "../kvasir.h"

namespace kvs {

/** False: the driver has no such maps. */
bool has_tensor_maps();

/** `rank` sizes, the innermost first, and one stride less, in bytes, multiples of 16; boxes of `rank` sizes, 128 bytes
 * wide. F8E4M3 is copied as bytes. What lies outside comes as zeros. False: the driver refuses. */
bool encode_tensor_map(CUtensorMap* map, kvs_dtype dtype, int rank, const void* data, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box);

}  // namespace kvs
