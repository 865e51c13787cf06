// kvs_matmul: few rows go to our own kernels, which read weights at the speed of memory; the rest to the library.

#include "matmul.h"

#include "convert.h"
#include "device.h"
#include "skinny-matmul.h"

namespace kvs {

namespace {

cudaDataType_t cuda_type(kvs_dtype dtype) {
  switch (dtype) {
    case KVS_F16: return CUDA_R_16F;
    case KVS_BF16: return CUDA_R_16BF;
    case KVS_F8E4M3: return CUDA_R_8F_E4M3;
    default: return CUDA_R_32F;
  }
}

SkinnyMatmulArgs skinny_args(const MatmulArgs& args, const kvs_device_config& config, const Gpu& gpu,
                             const DeviceMemory& workspace, cudaStream_t stream) {
  SkinnyMatmulArgs skinny{};
  skinny.y = args.y;
  skinny.x = args.x;
  skinny.weight = args.weight->memory.as();
  skinny.scales = args.weight->scales.as<const float>();
  skinny.bias = args.bias;
  skinny.y_dtype = args.is_f32_out ? kvs_dtype{KVS_F32} : config.compute_dtype;
  skinny.x_dtype = config.compute_dtype;
  skinny.weight_dtype = args.weight->dtype;
  skinny.rows = args.row_count;
  skinny.outputs = args.weight->rows;
  skinny.inputs = args.weight->cols;
  skinny.is_accumulating = args.is_accumulating;
  skinny.workspace = workspace.as();
  skinny.workspace_bytes = workspace.bytes();
  skinny.sm_count = gpu.sm_count;
  skinny.compute_capability = gpu.compute_capability;
  skinny.stream = stream;
  return skinny;
}

/** Grows `memory` to `bytes`; what captured graphs may still use is kept. */
void grow(DeviceMemory& memory, uint64_t bytes, std::vector<DeviceMemory>& outgrown, const char* purpose) {
  if (memory.bytes() >= bytes) return;
  DeviceMemory larger(bytes, purpose);
  std::swap(memory, larger);
  if (!larger.is_empty()) outgrown.push_back(std::move(larger));
}

}  // namespace

Matmuls::Matmuls(const kvs_device_config& config, const Gpu& gpu) : config_(config), gpu_(gpu), library_(gpu) {
  const uint64_t bytes = skinny_matmul_workspace_bytes(gpu.sm_count);
  skinny_workspace_ = DeviceMemory(bytes, "the workspace of skinny products");
  if (bytes != 0) check_cuda(cudaMemset(skinny_workspace_.as(), 0, bytes), "cudaMemset");
}

void Matmuls::prepare(const kvs_weight& weight) {
  grow(bias_, static_cast<uint64_t>(weight.rows) * sizeof(float), outgrown_, "a bias");
  if (weight.dtype == config_.compute_dtype) return;
  if (weight.dtype != KVS_F8E4M3 || config_.compute_dtype == KVS_F32) {
    fail(KVS_UNSUPPORTED, "this device multiplies weights of its compute type, or F8E4M3 with F16 or BF16");
  }
  const cudaDataType_t y_type = cuda_type(config_.compute_dtype);
  if (!library_.supports({CUDA_R_8F_E4M3, y_type, 256, weight.rows, weight.cols, false, false})) {
    fail(
        KVS_UNSUPPORTED,
        "no FP8 product for a (%u, %u) matrix here: both must be multiples of 16, the GPU of compute capability 9.0, "
        "cuBLASLt 12.9 or newer",
        weight.rows, weight.cols);
  }
  grow(x_, static_cast<uint64_t>(config_.max_rows) * weight.cols, outgrown_, "FP8 activations");
  grow(x_scales_, static_cast<uint64_t>(config_.max_rows) * sizeof(float), outgrown_, "FP8 activation scales");
}

ProductShape Matmuls::shape_of(const MatmulArgs& args) const {
  return {cuda_type(args.weight->dtype),
          args.is_f32_out ? CUDA_R_32F : cuda_type(config_.compute_dtype),
          args.row_count,
          args.weight->rows,
          args.weight->cols,
          args.is_accumulating,
          args.bias != nullptr};
}

bool Matmuls::is_known(const MatmulArgs& args) const {
  return skinny_matmul_supports(skinny_args(args, config_, gpu_, skinny_workspace_, nullptr)) ||
         library_.is_known(shape_of(args));
}

bool Matmuls::enqueue_skinny(const MatmulArgs& args, cudaStream_t stream) const {
  const SkinnyMatmulArgs skinny = skinny_args(args, config_, gpu_, skinny_workspace_, stream);
  if (!skinny_matmul_supports(skinny)) return false;
  check_cuda(skinny_matmul(skinny), "skinny_matmul");
  return true;
}

void Matmuls::enqueue(const MatmulArgs& args, cudaStream_t stream) {
  if (enqueue_skinny(args, stream)) return;
  Product product{};
  product.shape = shape_of(args);
  product.y = args.y;
  product.x = args.x;
  product.weight = args.weight->memory.as();
  product.bias = args.bias;
  const cudaDataType_t bias_type = bias_type_of(product.shape);
  if (args.bias != nullptr && bias_type != CUDA_R_32F) {
    const kvs_dtype dtype = bias_type == CUDA_R_16F ? KVS_F16 : KVS_BF16;
    convert(bias_.as(), dtype, args.bias, KVS_F32, args.weight->rows, stream);
    product.bias = bias_.as();
  }
  if (args.weight->dtype == KVS_F8E4M3) {
    quantise_rows(x_.as(), x_scales_.as<float>(), args.x, config_.compute_dtype, args.row_count, args.weight->cols,
                  stream);
    product.x = x_.as();
    product.x_scales = x_scales_.as<const float>();
    product.weight_scales = args.weight->scales.as<const float>();
  }
  library_.enqueue(product, stream);
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
    const bool is_f32_out = (flags & KVS_MATMUL_F32_OUT) != 0;
    const uint64_t y_count = static_cast<uint64_t>(row_count) * w.rows;
    const kvs::MatmulArgs args{
        d.device_memory(y, is_f32_out ? y_count * sizeof(float) : d.compute_bytes(row_count, w.rows), "y"),
        d.device_memory(x, d.compute_bytes(row_count, w.cols), "x"),
        &w,
        bias == 0 ? nullptr : d.device_memory<const float>(bias, w.rows * sizeof(float), "bias"),
        row_count,
        (flags & KVS_MATMUL_ACCUMULATE) != 0,
        is_f32_out};
    if (!d.is_capturing() && !d.matmuls.is_known(args)) d.compute.drain();
    d.matmuls.enqueue(args, d.compute);
  });
}
