// Small copies from page-locked memory to the device by a kernel. The copy engine of a direction serves all streams in
// turn: the few KiB that a step begins with would wait for whatever loads of KV stand there already.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvs {

/** From this size up the copy engine is the better way. */
constexpr uint64_t host_read_bytes_max = 256 << 10;

/**
 * Copies `bytes`, at most host_read_bytes_max and a multiple of 4, in stream order. Both addresses on 4 bytes; source
 * page-locked and mapped at its own address.
 */
void read_host(void* destination, const void* source, uint64_t bytes, cudaStream_t stream);

}  // namespace kvs
