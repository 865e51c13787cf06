// Matrix products by cuBLASLt. The algorithm of a shape is picked by timing the library's suggestions when the shape
// is first met, and remembered on disk.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "cublaslt-api.h"
#include "device-memory.h"
#include "gpu.h"
#include "plan-file.h"
#include "streams.h"

namespace kvs {

/** Of x and y. */
inline constexpr uint32_t matmul_alignment_bytes = 16;

/** What an algorithm is chosen by. y (rows, outputs) = x (rows, inputs) weight^T. */
struct ProductShape {
  cudaDataType_t input_type;   // of x and weight
  cudaDataType_t output_type;  // of y
  uint32_t rows;
  uint32_t outputs;
  uint32_t inputs;
  bool is_accumulating;
  bool has_bias;
  bool has_scales;  // of rows and outputs, in the product: F8E4M3 inputs only, which without them count as they are

  auto tie() const {
    return std::tie(input_type, output_type, rows, outputs, inputs, is_accumulating, has_bias, has_scales);
  }
  bool operator<(const ProductShape& other) const { return tie() < other.tie(); }
};

/** What the library wants a bias in: the type of y, except that FP8 products take no F32. */
inline cudaDataType_t bias_type_of(const ProductShape& shape) {
  return shape.input_type == CUDA_R_8F_E4M3 && shape.output_type == CUDA_R_32F ? CUDA_R_16BF : shape.output_type;
}

struct Product {
  ProductShape shape;
  void* y;
  const void* x;
  const void* weight;
  const void* bias;       // (outputs) of bias_type_of(shape), or null
  const float* x_scales;  // (rows), (outputs): of a shape that has scales
  const float* weight_scales;
};

class LibraryMatmul {
 public:
  explicit LibraryMatmul(const Gpu& gpu);
  ~LibraryMatmul();

  /** Whether the library has any algorithm for the shape. */
  bool supports(const ProductShape& shape);
  /** False: enqueue() may time algorithms, so what the GPU runs should have ended. */
  bool is_known(const ProductShape& shape) const { return plans_.count(shape) != 0; }
  void enqueue(const Product& product, cudaStream_t stream);
  /** Gives back the memory that timing took. Not during a capture: it waits for the device. */
  void settle();

 private:
  struct Plan;

  Plan& plan_for(const Product& product);
  std::unique_ptr<Plan> make_plan(const ProductShape& shape) const;
  bool is_valid(const Plan& plan, const cublaslt::Algorithm& algorithm) const;
  void choose(Plan& plan, const Product& product);
  void time_candidates(Plan& plan, const Product& product, const cublaslt::HeuristicResult* results, int count);
  bool make_scratch(uint64_t bytes);
  float milliseconds_of(Plan& plan, const Product& product) const;
  void run(const Plan& plan, const Product& product, void* y, cudaStream_t stream) const;

  const cublaslt::Api& api_;
  cublaslt::Handle handle_ = nullptr;
  cublaslt::Preference preference_ = nullptr;
  DeviceMemory workspace_;
  CudaStream timing_stream_;
  std::vector<DeviceMemory> scratch_;  // the last one is in use; earlier ones were too small
  PlanFile file_;
  std::map<ProductShape, std::unique_ptr<Plan>> plans_;     // exact shapes
  std::map<ProductShape, cublaslt::Algorithm> algorithms_;  // shapes with rows rounded up to a bucket
};

}  // namespace kvs
