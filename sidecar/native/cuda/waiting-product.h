// A product waits for a moment before it is launched: a gate that follows it then becomes part of its kernel, where one
// of ours serves both. And the choice between our kernels and the library.

#pragma once

#include <optional>

#include "device-memory.h"
#include "gpu.h"
#include "matmul.h"
#include "skinny-matmul.h"

namespace kvs {

class WaitingProduct {
 public:
  /** matmuls: for what the library multiplies. */
  WaitingProduct(const Gpu& gpu, Matmuls& matmuls);

  /** Takes the product, having launched the one before it. */
  void add(const MatmulArgs& args, cudaStream_t stream);
  /** gated (rows, size) = silu(y[:, :size]) * y[:, size:] becomes part of the product that waits; false: it cannot. */
  bool add_gate(void* gated, const void* y, uint32_t rows, uint32_t size);
  /** Enqueues what waits. The library times a product of a new kind when it is first launched, so what the GPU runs
   * ends before that, unless the stream is being captured. Throws Failure: KVS_DEVICE_FAILED, or KVS_UNSUPPORTED where
   * the library has no such product; whoever enqueues next gets it, not who added the product. */
  void launch(cudaStream_t stream);

 private:
  struct Waiting {
    MatmulArgs args;
    SkinnyProduct product;
  };

  void launch_by_library(const MatmulArgs& args, cudaStream_t stream);

  Matmuls& matmuls_;
  DeviceMemory workspace_;
  DeviceMemory stream_k_workspace_;
  SkinnyDevice device_;
  std::optional<Waiting> waiting_;
};

}  // namespace kvs
