// Row-major y = x weight^T is, column by column, y^T = weight x^T: the library's A is the weight (transposed), B is
// x.

#include "library-matmul.h"

#include <algorithm>
#include <array>
#include <string>

namespace kvs {

namespace {

using cublaslt::Algorithm;
using cublaslt::HeuristicResult;

constexpr uint64_t workspace_bytes = 64ull << 20;
/** Written between timed runs: more than any level-2 cache, so that weights come from memory as they do in a model.
 */
constexpr uint64_t flush_bytes = 96ull << 20;
/** The first version that knows outer-vector scales: older ones call the attribute an error. */
constexpr uint64_t outer_vector_version = 120900;
constexpr int candidate_count = 16;
constexpr int timed_runs = 3;

void check_library(cublaslt::Status status, const char* what) {
  if (status != cublaslt::status_success) fail(KVS_DEVICE_FAILED, "%s: cuBLASLt status %d", what, status);
}

uint64_t bytes_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : type == CUDA_R_8F_E4M3 ? 1 : 2; }

/** Steps of an eighth to a quarter: what is fastest for one is near the fastest for its neighbours. */
uint32_t row_bucket(uint32_t rows) {
  uint32_t step = 1;
  while (rows > 8 * step) step *= 2;
  return (rows + step - 1) / step * step;
}

ProductShape bucket_of(ProductShape shape) {
  shape.rows = row_bucket(shape.rows);
  return shape;
}

std::string key_of(const ProductShape& s) {
  return std::to_string(s.input_type) + "-" + std::to_string(s.output_type) + "-" + std::to_string(s.rows) + "x" +
         std::to_string(s.outputs) + "x" + std::to_string(s.inputs) + (s.is_accumulating ? "-acc" : "") +
         (s.has_bias ? "-bias" : "") + (s.input_type == CUDA_R_8F_E4M3 && !s.has_scales ? "-unscaled" : "");
}

std::string file_prefix(const Gpu& gpu, const cublaslt::Api& api) {
  std::string name = gpu.name;
  std::replace(name.begin(), name.end(), ' ', '_');
  return name + "/" + std::to_string(api.get_version()) + "/";
}

}  // namespace

/** Descriptors of one shape, and the algorithm chosen for it. */
struct LibraryMatmul::Plan {
  Plan(const cublaslt::Api& api) : api(api) {}
  ~Plan() {
    for (cublaslt::MatrixLayout layout : {weight, x, y}) {
      if (layout != nullptr) api.layout_destroy(layout);
    }
    if (desc != nullptr) api.desc_destroy(desc);
  }

  const cublaslt::Api& api;
  cublaslt::MatmulDesc desc = nullptr;
  cublaslt::MatrixLayout weight = nullptr;
  cublaslt::MatrixLayout x = nullptr;
  cublaslt::MatrixLayout y = nullptr;
  Algorithm algorithm{};
};

LibraryMatmul::LibraryMatmul(const Gpu& gpu)
    : api_(cublaslt::api()),
      workspace_(workspace_bytes, "the workspace of matrix products"),
      timing_stream_(0),
      file_(file_prefix(gpu, api_)) {
  check_library(api_.create(&handle_), "cublasLtCreate");
  check_library(api_.preference_create(&preference_), "cublasLtMatmulPreferenceCreate");
  check_library(api_.preference_set(preference_, cublaslt::preference_max_workspace_bytes, &workspace_bytes,
                                    sizeof workspace_bytes),
                "cublasLtMatmulPreferenceSetAttribute");
  // Activations may begin anywhere that kvs_matmul accepts; weights are allocations of their own.
  for (cublaslt::PreferenceAttribute attribute :
       {cublaslt::preference_min_alignment_b_bytes, cublaslt::preference_min_alignment_c_bytes,
        cublaslt::preference_min_alignment_d_bytes}) {
    check_library(api_.preference_set(preference_, attribute, &matmul_alignment_bytes, sizeof matmul_alignment_bytes),
                  "cublasLtMatmulPreferenceSetAttribute");
  }
}

LibraryMatmul::~LibraryMatmul() {
  plans_.clear();
  if (preference_ != nullptr) api_.preference_destroy(preference_);
  if (handle_ != nullptr) api_.destroy(handle_);
}

std::unique_ptr<LibraryMatmul::Plan> LibraryMatmul::make_plan(const ProductShape& s) const {
  auto plan = std::make_unique<Plan>(api_);
  const auto set = [&](cublaslt::DescAttribute attribute, const auto& value) {
    check_library(api_.desc_set(plan->desc, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  };
  check_library(api_.desc_create(&plan->desc, cublaslt::compute_32f, CUDA_R_32F), "cublasLtMatmulDescCreate");
  set(cublaslt::desc_trans_a, cublaslt::operation_t);
  set(cublaslt::desc_trans_b, cublaslt::operation_n);
  if (s.has_bias) {
    set(cublaslt::desc_epilogue, cublaslt::epilogue_bias);
    set(cublaslt::desc_bias_data_type, static_cast<int32_t>(bias_type_of(s)));
  }
  if (s.input_type == CUDA_R_8F_E4M3) set(cublaslt::desc_fast_accumulation, static_cast<int8_t>(0));
  if (s.has_scales) {
    set(cublaslt::desc_a_scale_mode, cublaslt::scale_mode_outer_vector);
    set(cublaslt::desc_b_scale_mode, cublaslt::scale_mode_outer_vector);
    // The check of an algorithm wants pointers; each call sets its own.
    set(cublaslt::desc_a_scale_pointer, static_cast<const void*>(workspace_.as()));
    set(cublaslt::desc_b_scale_pointer, static_cast<const void*>(workspace_.as()));
  }
  const auto layout = [&](cublaslt::MatrixLayout& out, cudaDataType_t type, uint32_t rows, uint32_t cols) {
    check_library(api_.layout_create(&out, type, rows, cols, rows), "cublasLtMatrixLayoutCreate");
  };
  layout(plan->weight, s.input_type, s.inputs, s.outputs);
  layout(plan->x, s.input_type, s.inputs, s.rows);
  layout(plan->y, s.output_type, s.outputs, s.rows);
  return plan;
}

bool LibraryMatmul::supports(const ProductShape& shape) {
  if (shape.has_scales && api_.get_version() < outer_vector_version) return false;
  const std::unique_ptr<Plan> plan = make_plan(shape);
  HeuristicResult result{};
  int count = 0;
  const cublaslt::Status status = api_.get_heuristic(handle_, plan->desc, plan->weight, plan->x, plan->y, plan->y,
                                                     preference_, 1, &result, &count);
  return status == cublaslt::status_success && count > 0 && result.state == cublaslt::status_success;
}

bool LibraryMatmul::is_valid(const Plan& plan, const Algorithm& algorithm) const {
  HeuristicResult result{};
  return api_.check(handle_, plan.desc, plan.weight, plan.x, plan.y, plan.y, &algorithm, &result) ==
             cublaslt::status_success &&
         result.workspace_bytes <= workspace_bytes;
}

LibraryMatmul::Plan& LibraryMatmul::plan_for(const Product& product) {
  const auto found = plans_.find(product.shape);
  if (found != plans_.end()) return *found->second;
  std::unique_ptr<Plan> plan = make_plan(product.shape);
  choose(*plan, product);
  return *plans_.emplace(product.shape, std::move(plan)).first->second;
}

void LibraryMatmul::choose(Plan& plan, const Product& product) {
  const ProductShape bucket = bucket_of(product.shape);
  const auto remembered = algorithms_.find(bucket);
  if (remembered != algorithms_.end() && is_valid(plan, remembered->second)) {
    plan.algorithm = remembered->second;
    return;
  }
  const std::optional<Algorithm> stored = file_.find(key_of(bucket));
  if (stored.has_value() && is_valid(plan, *stored)) {
    plan.algorithm = *stored;
    algorithms_[bucket] = *stored;
    return;
  }
  std::array<HeuristicResult, candidate_count> results{};
  int count = 0;
  check_library(api_.get_heuristic(handle_, plan.desc, plan.weight, plan.x, plan.y, plan.y, preference_,
                                   candidate_count, results.data(), &count),
                ("no product for " + key_of(product.shape)).c_str());
  if (count == 0) fail(KVS_UNSUPPORTED, "cuBLASLt has no product for %s", key_of(product.shape).c_str());
  time_candidates(plan, product, results.data(), count);
  // An algorithm that serves only odd shapes of a bucket must not push out the one for all.
  if (algorithms_.emplace(bucket, plan.algorithm).second) file_.add(key_of(bucket), plan.algorithm);
}

void LibraryMatmul::time_candidates(Plan& plan, const Product& product, const HeuristicResult* results, int count) {
  plan.algorithm = results[0].algorithm;
  const ProductShape& s = product.shape;
  const uint64_t y_bytes = static_cast<uint64_t>(s.rows) * s.outputs * bytes_of(s.output_type);
  if (!make_scratch(std::max(flush_bytes, y_bytes))) return;  // no room to try: the library's first suggestion it is
  float best = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (results[i].state != cublaslt::status_success || results[i].workspace_bytes > workspace_bytes) continue;
    const Algorithm kept = plan.algorithm;
    plan.algorithm = results[i].algorithm;
    const float time = milliseconds_of(plan, product);
    if (best == 0.0f || time < best) {
      best = time;
    } else {
      plan.algorithm = kept;
    }
  }
}

bool LibraryMatmul::make_scratch(uint64_t bytes) {
  if (!scratch_.empty() && scratch_.back().bytes() >= bytes) return true;
  try {
    scratch_.emplace_back(bytes, "the timing of products");
    return true;
  } catch (const Failure& failure) {
    if (failure.status() != KVS_OUT_OF_MEMORY) throw;
    return false;
  }
}

void LibraryMatmul::settle() { scratch_.clear(); }

/** Median over a few runs with weights out of the cache. y goes to scratch memory: the product must not happen twice.
 */
float LibraryMatmul::milliseconds_of(Plan& plan, const Product& product) const {
  const CudaEvent begin(cudaEventDefault);
  const CudaEvent end(cudaEventDefault);
  char* y = scratch_.back().as();
  run(plan, product, y, timing_stream_);
  std::array<float, timed_runs> times{};
  for (float& time : times) {
    check_cuda(cudaMemsetAsync(y, 0, flush_bytes, timing_stream_), "cudaMemset");
    begin.record(timing_stream_);
    run(plan, product, y, timing_stream_);
    end.record(timing_stream_);
    end.wait();
    check_cuda(cudaEventElapsedTime(&time, begin, end), "cudaEventElapsedTime");
  }
  std::sort(times.begin(), times.end());
  return times[timed_runs / 2];
}

void LibraryMatmul::enqueue(const Product& product, cudaStream_t stream) {
  run(plan_for(product), product, product.y, stream);
}

void LibraryMatmul::run(const Plan& plan, const Product& product, void* y, cudaStream_t stream) const {
  const auto set = [&](cublaslt::DescAttribute attribute, const void* pointer) {
    check_library(api_.desc_set(plan.desc, attribute, &pointer, sizeof pointer), "cublasLtMatmulDescSetAttribute");
  };
  if (product.shape.has_bias) set(cublaslt::desc_bias_pointer, product.bias);
  if (product.shape.has_scales) {
    set(cublaslt::desc_a_scale_pointer, product.weight_scales);
    set(cublaslt::desc_b_scale_pointer, product.x_scales);
  }
  const float alpha = 1.0f;
  const float beta = product.shape.is_accumulating ? 1.0f : 0.0f;
  check_library(api_.matmul(handle_, plan.desc, &alpha, product.weight, plan.weight, product.x, plan.x, &beta, y,
                            plan.y, y, plan.y, &plan.algorithm, workspace_.as(), workspace_bytes, stream),
                "cublasLtMatmul");
}

}  // namespace kvs
