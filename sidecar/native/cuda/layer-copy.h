// One layer of many blocks between host slots and gpu blocks: the transfer that loads and saves are made of.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace kvs {

enum class CopyMethod {
  engine,  // the copy engine, one batch of slices
  rows,    // the copy engine, neighbours as rows of a matrix
  kernel,  // a kernel on a few multiprocessors that reads and writes host memory
};

/** Slices of `bytes` each: host slot slots[i] and gpu block blocks[i], both `stride_bytes` apart from the next. */
struct LayerCopy {
  char* host;    // this layer of slot 0, page-locked
  char* device;  // this layer of block 0
  uint64_t stride_bytes;
  uint64_t bytes;  // a multiple of 16
  const int32_t* slots;
  const int32_t* blocks;
  uint32_t count;
  bool is_load;
};

/** Rows where most slices are neighbours, else `scattered`. */
CopyMethod method_for(const LayerCopy& copy, CopyMethod scattered);

/** Slots and blocks are read before the return. Throws Failure. */
void copy_layer(const LayerCopy& copy, CopyMethod method, cudaStream_t stream);

}  // namespace kvs
