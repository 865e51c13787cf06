// Matrix products by the library, and the memory that they share; others are for our own kernels (WaitingProduct).

#pragma once

#include <cstdint>
#include <vector>

#include "device-memory.h"
#include "gpu.h"
#include "library-matmul.h"
#include "skinny-matmul.h"
#include "weight.h"

namespace kvs {

struct MatmulArgs {
  void* y;        // (row_count, weight rows) of y_dtype
  const void* x;  // (row_count, weight cols), compute type
  const kvs_weight* weight;
  const float* bias;  // (weight rows) or null
  uint32_t row_count;
  kvs_dtype y_dtype;     // compute type or F32
  bool is_accumulating;  // y += instead of y =; F32
};

class Matmuls {
 public:
  Matmuls(const kvs_device_config& config, const Gpu& gpu);

  /** Makes room for products with this matrix and settles where its scales come in. Throws Failure(KVS_UNSUPPORTED)
   * when there is no product for its type. */
  void prepare(kvs_weight& weight);
  /** Where those of FP8 matrices came in so far: "inside" the product, "after" it; "none": there is no such matrix. */
  const char* fp8_scales() const { return !sums_.is_empty() ? "after" : !x_.is_empty() ? "inside" : "none"; }
  /** The product as our own kernels take it; whether they serve it is for them to say. */
  SkinnyProduct as_skinny(const MatmulArgs& args) const;
  /** False: enqueueing a product of this kind times it first, see LibraryMatmul::is_known. */
  bool is_known(const MatmulArgs& args) const { return library_.is_known(shape_of(args)); }
  /** By the library. */
  void enqueue(const MatmulArgs& args, cudaStream_t stream);
  void settle() { library_.settle(); }

 private:
  void prepare_fp8(kvs_weight& weight);
  ProductShape shape_of(const MatmulArgs& args) const;
  const void* bias_of(const MatmulArgs& args, const ProductShape& shape, cudaStream_t stream) const;
  void enqueue_scaled_after(Product product, const MatmulArgs& args, cudaStream_t stream);

  const kvs_device_config config_;
  const Gpu gpu_;
  LibraryMatmul library_;
  DeviceMemory bias_;                   // a bias in the type of y
  DeviceMemory x_;                      // F8E4M3 x
  DeviceMemory x_scales_;               // (max_rows)
  DeviceMemory sums_;                   // BF16 y before scales, where they come after
  std::vector<DeviceMemory> outgrown_;  // captured graphs may still use them
};

}  // namespace kvs
