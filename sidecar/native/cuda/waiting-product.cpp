// Which gates become part of a product: those whose rows lie apart from what its other thread blocks read and write.

#include "waiting-product.h"

#include <cstdlib>
#include <string_view>
#include <utility>

#include "../common/step-input.h"
#include "cuda-error.h"
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

/** So that what serves GPUs older than Hopper can be checked on one. */
bool has_stream_k() {
  static const char* const wanted = std::getenv("KVASIR_CUDA_STREAM_K");
  return wanted == nullptr || std::string_view(wanted) != "off";
}

/** The faster one where both serve a product, as H100s and H200s have shown it. */
bool is_for_stream_k(const SkinnyProduct& product, const SkinnyDevice& device) {
  if (!has_stream_k() || !stream_k_supports(product, device)) return false;
  constexpr uint32_t ring_rows_max = 2;
  return product.rows > ring_rows_max || !skinny_supports(product, device);
}

bool is_ours(const SkinnyProduct& product, const SkinnyDevice& device) {
  return is_for_stream_k(product, device) || skinny_supports(product, device);
}

}  // namespace

WaitingProduct::WaitingProduct(const Gpu& gpu)
    : workspace_(skinny_workspace_bytes(), "the workspace of skinny products"),
      stream_k_workspace_(stream_k_workspace_bytes(gpu.sm_count, gpu.compute_capability),
                          "the workspace of stream-K products") {
  for (const DeviceMemory* memory : {&workspace_, &stream_k_workspace_}) {
    if (!memory->is_empty()) check_cuda(cudaMemset(memory->as(), 0, memory->bytes()), "cudaMemset");
  }
  device_ = {workspace_.as(), stream_k_workspace_.as(), gpu.sm_count, gpu.compute_capability};
}

bool WaitingProduct::add(const SkinnyProduct& product, cudaStream_t stream) {
  if (!is_ours(product, device_)) return false;
  launch(stream);
  product_ = product;
  return true;
}

bool WaitingProduct::add_gate(void* gated, const void* y, uint32_t rows, uint32_t size) {
  if (!product_.has_value() || product_->gated != nullptr || product_->y != y || product_->rows != rows ||
      product_->outputs != 2ull * size) {
    return false;
  }
  SkinnyProduct with_gate = *product_;
  with_gate.gated = gated;
  if (!has_gated_apart(with_gate) || !is_ours(with_gate, device_)) return false;
  product_ = with_gate;
  return true;
}

void WaitingProduct::launch(cudaStream_t stream) {
  const std::optional<SkinnyProduct> product = std::exchange(product_, std::nullopt);
  if (!product.has_value()) return;
  if (is_for_stream_k(*product, device_)) {
    check_cuda(stream_k_matmul(*product, device_, stream), "stream_k_matmul");
  } else {
    check_cuda(skinny_matmul(*product, device_, stream), "skinny_matmul");
  }
}

}  // namespace kvs
