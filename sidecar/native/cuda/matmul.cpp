// kvs_matmul, and what the library multiplies: all that our own kernels do not, see WaitingProduct.

#include "matmul.h"

#include <cstdlib>
#include <string_view>

#include "convert.h"
#include "device.h"
#include "fp8-order.h"
#include "scale-product.h"

namespace kvs {

namespace {

constexpr int fp8_capability_min = 89;
constexpr uint32_t fp8_multiple = 16;  // of rows and cols

cudaDataType_t cuda_type(kvs_dtype dtype) {
  switch (dtype) {
    case KVS_F16: return CUDA_R_16F;
    case KVS_BF16: return CUDA_R_16BF;
    case KVS_F8E4M3: return CUDA_R_8F_E4M3;
    default: return CUDA_R_32F;
  }
}

/** So that what serves GPUs without scales inside products can be checked on one that has them. */
bool wants_scales_after() {
  static const char* const wanted = std::getenv("KVASIR_CUDA_FP8_SCALES");
  return wanted != nullptr && std::string_view(wanted) == "after";
}

/** Of an FP8 product before its scales: F32 ones lie where y will, others in memory of their own, in BF16 whatever the
 * compute type, as F16 ends at 65504: 448 x 448 is more. */
kvs_dtype sums_dtype_of(const MatmulArgs& args) {
  return args.y_dtype == KVS_F32 && !args.is_accumulating ? KVS_F32 : KVS_BF16;
}

/** Grows `memory` to `bytes`; what captured graphs may still use is kept. */
void grow(DeviceMemory& memory, uint64_t bytes, std::vector<DeviceMemory>& outgrown, const char* purpose) {
  if (memory.bytes() >= bytes) return;
  DeviceMemory larger(bytes, purpose);
  std::swap(memory, larger);
  if (!larger.is_empty()) outgrown.push_back(std::move(larger));
}

}  // namespace

Matmuls::Matmuls(const kvs_device_config& config, const Gpu& gpu) : config_(config), gpu_(gpu), library_(gpu) {}

void Matmuls::prepare(kvs_weight& weight) {
  grow(bias_, static_cast<uint64_t>(weight.rows) * sizeof(float), outgrown_, "a bias");
  if (weight.dtype == config_.compute_dtype) return;
  if (weight.dtype != KVS_F8E4M3 || config_.compute_dtype == KVS_F32) {
    fail(KVS_UNSUPPORTED, "this device multiplies weights of its compute type, or F8E4M3 with F16 or BF16");
  }
  prepare_fp8(weight);
}

void Matmuls::prepare_fp8(kvs_weight& weight) {
  // Not asked of the library: whatever it says, these GPUs have no FP8 in their matrix units.
  if (gpu_.compute_capability < fp8_capability_min) {
    fail(KVS_UNSUPPORTED, "FP8 needs a GPU of compute capability 8.9 or newer: %s has %d.%d", gpu_.name.c_str(),
         gpu_.compute_capability / 10, gpu_.compute_capability % 10);
  }
  if (weight.rows % fp8_multiple != 0 || weight.cols % fp8_multiple != 0) {
    fail(KVS_UNSUPPORTED, "FP8 needs rows and cols that are multiples of %u, not (%u, %u)", fp8_multiple, weight.rows,
         weight.cols);
  }
  const uint64_t max_rows = config_.max_rows;
  const cudaDataType_t y_type = cuda_type(config_.compute_dtype);
  const uint32_t row_bytes = fp8_row_bytes(weight.cols);
  const ProductShape scaled{CUDA_R_8F_E4M3, y_type, 256, weight.rows, row_bytes, false, false, true};
  const ProductShape added{CUDA_R_8F_E4M3, CUDA_R_32F, 256, weight.rows, row_bytes, true, false, true};
  const ProductShape unscaled{CUDA_R_8F_E4M3, CUDA_R_16BF, 256, weight.rows, row_bytes, false, false, false};
  // Inside the product they cost nothing.
  weight.is_scaled_after = wants_scales_after() || !library_.supports(scaled) || !library_.supports(added);
  if (weight.is_scaled_after) {
    if (!library_.supports(unscaled)) {
      fail(KVS_UNSUPPORTED,
           "cuBLASLt has no FP8 product for a (%u, %u) matrix on %s: it must be new enough for this GPU", weight.rows,
           weight.cols, gpu_.name.c_str());
    }
    grow(sums_, max_rows * weight.rows * dtype_bytes(KVS_BF16), outgrown_, "FP8 products before their scales");
  }
  grow(x_, max_rows * row_bytes, outgrown_, "FP8 activations");
  grow(x_scales_, max_rows * sizeof(float), outgrown_, "FP8 activation scales");
}

ProductShape Matmuls::shape_of(const MatmulArgs& args) const {
  ProductShape shape{};
  shape.input_type = cuda_type(args.weight->dtype);
  shape.rows = args.row_count;
  shape.outputs = args.weight->rows;
  // Rows of F8E4M3 are filled up with zeros, x and weight alike.
  shape.inputs = args.weight->dtype == KVS_F8E4M3 ? fp8_row_bytes(args.weight->cols) : args.weight->cols;
  if (args.weight->is_scaled_after) {
    shape.output_type = cuda_type(sums_dtype_of(args));
    return shape;
  }
  shape.output_type = cuda_type(args.y_dtype);
  shape.is_accumulating = args.is_accumulating;
  shape.has_bias = args.bias != nullptr;
  shape.has_scales = args.weight->dtype == KVS_F8E4M3;
  return shape;
}

SkinnyProduct Matmuls::as_skinny(const MatmulArgs& args) const {
  SkinnyProduct product{};
  product.y = args.y;
  product.x = args.x;
  product.weight = args.weight->memory.as();
  product.scales = args.weight->scales.as<const float>();
  product.bias = args.bias;
  product.y_dtype = args.y_dtype;
  product.x_dtype = config_.compute_dtype;
  product.weight_dtype = args.weight->dtype;
  product.rows = args.row_count;
  product.outputs = args.weight->rows;
  product.inputs = args.weight->cols;
  product.is_accumulating = args.is_accumulating;
  return product;
}

/** In the type that the library wants. */
const void* Matmuls::bias_of(const MatmulArgs& args, const ProductShape& shape, cudaStream_t stream) const {
  const cudaDataType_t type = bias_type_of(shape);
  if (!shape.has_bias || type == CUDA_R_32F) return args.bias;
  convert(bias_.as(), type == CUDA_R_16F ? KVS_F16 : KVS_BF16, args.bias, KVS_F32, shape.outputs, stream);
  return bias_.as();
}

void Matmuls::enqueue(const MatmulArgs& args, cudaStream_t stream) {
  Product product{};
  product.shape = shape_of(args);
  product.y = args.y;
  product.x = args.x;
  product.weight = args.weight->memory.as();
  product.bias = bias_of(args, product.shape, stream);
  if (args.weight->dtype == KVS_F8E4M3) {
    quantise_rows(x_.as(), x_scales_.as<float>(), args.x, config_.compute_dtype, args.row_count, args.weight->cols,
                  stream);
    product.x = x_.as();
    product.x_scales = x_scales_.as<const float>();
    product.weight_scales = args.weight->scales.as<const float>();
  }
  if (args.weight->is_scaled_after) {
    enqueue_scaled_after(product, args, stream);
  } else {
    library_.enqueue(product, stream);
  }
}

void Matmuls::enqueue_scaled_after(Product product, const MatmulArgs& args, cudaStream_t stream) {
  const kvs_dtype sums_dtype = sums_dtype_of(args);
  product.y = sums_dtype == KVS_F32 ? args.y : sums_.as();
  library_.enqueue(product, stream);
  ScaleProductArgs scaling{};
  scaling.y = args.y;
  scaling.sums = product.y;
  scaling.row_scales = product.x_scales;
  scaling.output_scales = product.weight_scales;
  scaling.bias = args.bias;
  scaling.y_dtype = args.y_dtype;
  scaling.sums_dtype = sums_dtype;
  scaling.rows = args.row_count;
  scaling.outputs = args.weight->rows;
  scaling.is_accumulating = args.is_accumulating;
  scale_product(scaling, stream);
}

}  // namespace kvs

extern "C" kvs_status kvs_matmul(kvs_device* device, uint64_t y, uint64_t x, kvs_weight* weight, uint64_t bias,
                                 uint32_t row_count, uint32_t flags) {
  return kvs::with_device(device, [&](kvs_device& d) {
    kvs::check_rows(d, row_count);
    const kvs_weight& w = d.known(weight);
    kvs::require((flags & ~(KVS_MATMUL_ACCUMULATE | KVS_MATMUL_F32_OUT)) == 0, "matmul: flags %u", flags);
    kvs::require(y % kvs::matmul_alignment_bytes == 0 && x % kvs::matmul_alignment_bytes == 0,
                 "matmul: x and y must be 16-byte aligned");
    const kvs_dtype y_dtype = flags != 0 ? kvs_dtype{KVS_F32} : d.config.compute_dtype;
    const uint64_t y_count = static_cast<uint64_t>(row_count) * w.rows;
    const kvs::MatmulArgs args{
        d.device_memory(y, y_count * kvs::dtype_bytes(y_dtype), "y"),
        d.device_memory(x, d.compute_bytes(row_count, w.cols), "x"),
        &w,
        bias == 0 ? nullptr : d.device_memory<const float>(bias, w.rows * sizeof(float), "bias"),
        row_count,
        y_dtype,
        (flags & KVS_MATMUL_ACCUMULATE) != 0};
    d.add_product(args);
  });
}
