// Which kernel a product is for, and which gates become part of one: those whose rows lie apart from what its other
// thread blocks read and write.

#include "waiting-product.h"

#include <cstdlib>
#include <string_view>
#include <utility>

#include "../common/step-input.h"
#include "cuda-error.h"
#include "prompt-matmul.h"
#include "stream-k.h"

namespace kvs {

namespace {

bool overlap(const void* a, uint64_t a_bytes, const void* b, uint64_t b_bytes) {
  const auto a_begin = reinterpret_cast<uint64_t>(a);
  const auto b_begin = reinterpret_cast<uint64_t>(b);
  return a_begin < b_begin + b_bytes && b_begin < a_begin + a_bytes;
}

/** Thread blocks do not wait for one another: what one writes of the gated rows no other may still read, or write. */
bool has_gated_apart(const SkinnyProduct& p) {
  const uint64_t rows = p.rows;
  const uint64_t gated_bytes = rows * (p.outputs / 2) * dtype_bytes(p.x_dtype);
  const uint64_t bias_bytes = p.bias == nullptr ? 0 : static_cast<uint64_t>(p.outputs) * sizeof(float);
  return !overlap(p.gated, gated_bytes, p.x, rows * p.inputs * dtype_bytes(p.x_dtype)) &&
         !(p.is_accumulating && overlap(p.gated, gated_bytes, p.y, rows * p.outputs * dtype_bytes(p.y_dtype))) &&
         !overlap(p.gated, gated_bytes, p.bias, bias_bytes);
}

/** So that what serves GPUs other than Hopper can be checked on one. */
bool has_hopper_kernels() {
  static const char* const wanted = std::getenv("KVASIR_CUDA_HOPPER");
  return wanted == nullptr || std::string_view(wanted) != "off";
}

/** Where several serve a product the fastest one, as H100s and H200s have shown it. */
enum class Kernel { rings, stream_k, prompt, none };

/** Our products of many rows are as fast as the library's: what they win is the gate's kernel, unless tiles are few. */
bool is_for_prompt_kernel(const SkinnyProduct& product, const SkinnyDevice& device) {
  constexpr double use_min = 0.84;
  return prompt_matmul_supports(product, device) && prompt_matmul_use(product, device) >= use_min;
}

Kernel kernel_for(const SkinnyProduct& product, const SkinnyDevice& device) {
  constexpr uint32_t ring_rows_max = 2;
  const bool has_rings = skinny_supports(product, device);
  if (has_rings && product.rows <= ring_rows_max) return Kernel::rings;
  if (has_hopper_kernels()) {
    if (stream_k_supports(product, device)) return Kernel::stream_k;
    if (is_for_prompt_kernel(product, device)) return Kernel::prompt;
  }
  return has_rings ? Kernel::rings : Kernel::none;
}

}  // namespace

WaitingProduct::WaitingProduct(const Gpu& gpu, Matmuls& matmuls)
    : matmuls_(matmuls),
      workspace_(skinny_workspace_bytes(), "the workspace of skinny products"),
      stream_k_workspace_(stream_k_workspace_bytes(gpu.sm_count, gpu.compute_capability),
                          "the workspace of stream-K products") {
  for (const DeviceMemory* memory : {&workspace_, &stream_k_workspace_}) {
    if (!memory->is_empty()) check_cuda(cudaMemset(memory->as(), 0, memory->bytes()), "cudaMemset");
  }
  device_ = {workspace_.as(), stream_k_workspace_.as(), gpu.sm_count, gpu.compute_capability};
}

void WaitingProduct::add(const MatmulArgs& args, cudaStream_t stream) {
  launch(stream);
  waiting_ = {args, matmuls_.as_skinny(args)};
}

bool WaitingProduct::add_gate(void* gated, const void* y, uint32_t rows, uint32_t size) {
  if (!waiting_.has_value()) return false;
  SkinnyProduct product = waiting_->product;
  const bool is_its_gate = product.y == y && product.rows == rows && product.outputs == 2ull * size;
  if (product.gated != nullptr || !is_its_gate) return false;
  product.gated = gated;
  if (!has_gated_apart(product) || kernel_for(product, device_) == Kernel::none) return false;
  waiting_->product = product;
  return true;
}

void WaitingProduct::launch(cudaStream_t stream) {
  const std::optional<Waiting> waiting = std::exchange(waiting_, std::nullopt);
  if (!waiting.has_value()) return;
  const SkinnyProduct& product = waiting->product;
  switch (kernel_for(product, device_)) {
    case Kernel::rings: return check_cuda(skinny_matmul(product, device_, stream), "skinny_matmul");
    case Kernel::stream_k: return check_cuda(stream_k_matmul(product, device_, stream), "stream_k_matmul");
    case Kernel::prompt: return check_cuda(prompt_matmul(product, device_, stream), "prompt_matmul");
    case Kernel::none: return launch_by_library(waiting->args, stream);
  }
}

void WaitingProduct::launch_by_library(const MatmulArgs& args, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  if (capture == cudaStreamCaptureStatusNone && !matmuls_.is_known(args)) {
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  matmuls_.enqueue(args, stream);
}

}  // namespace kvs
