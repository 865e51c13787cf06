// A product of few rows waits for a moment before it is launched: a gate that follows it then becomes part of its
// kernel, which saves one a layer.

#pragma once

#include <optional>

#include "device-memory.h"
#include "gpu.h"
#include "skinny-matmul.h"

namespace kvs {

class WaitingProduct {
 public:
  explicit WaitingProduct(const Gpu& gpu);

  /** Takes the product, having launched the one before it; false: our kernels do not serve it, nothing is done. */
  bool add(const SkinnyProduct& product, cudaStream_t stream);
  /** gated (rows, size) = silu(y[:, :size]) * y[:, size:] becomes part of the product that waits; false: it cannot. */
  bool add_gate(void* gated, const void* y, uint32_t rows, uint32_t size);
  /** Enqueues what waits. Throws Failure(KVS_DEVICE_FAILED). */
  void launch(cudaStream_t stream);

 private:
  DeviceMemory workspace_;
  DeviceMemory stream_k_workspace_;
  SkinnyDevice device_;
  std::optional<SkinnyProduct> product_;
};

}  // namespace kvs
