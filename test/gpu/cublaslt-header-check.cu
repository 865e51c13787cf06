// Our own declarations of cuBLASLt against its header: sizes, offsets and values. Compiling is the check.

#include <cublasLt.h>

#include <cstddef>
#include <cstdio>
#include <type_traits>

#include "../../sidecar/native/cuda/cublaslt-api.h"

namespace ours = kvs::cublaslt;

#define SAME_VALUE(our_name, its_name) \
  static_assert(static_cast<long long>(ours::our_name) == static_cast<long long>(its_name), #its_name)

SAME_VALUE(status_success, CUBLAS_STATUS_SUCCESS);
SAME_VALUE(status_not_supported, CUBLAS_STATUS_NOT_SUPPORTED);
SAME_VALUE(compute_32f, CUBLAS_COMPUTE_32F);
SAME_VALUE(operation_n, CUBLAS_OP_N);
SAME_VALUE(operation_t, CUBLAS_OP_T);
SAME_VALUE(desc_trans_a, CUBLASLT_MATMUL_DESC_TRANSA);
SAME_VALUE(desc_trans_b, CUBLASLT_MATMUL_DESC_TRANSB);
SAME_VALUE(desc_epilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SAME_VALUE(desc_bias_pointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SAME_VALUE(desc_a_scale_pointer, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER);
SAME_VALUE(desc_b_scale_pointer, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER);
SAME_VALUE(desc_fast_accumulation, CUBLASLT_MATMUL_DESC_FAST_ACCUM);
SAME_VALUE(desc_bias_data_type, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
SAME_VALUE(epilogue_default, CUBLASLT_EPILOGUE_DEFAULT);
SAME_VALUE(epilogue_bias, CUBLASLT_EPILOGUE_BIAS);
SAME_VALUE(preference_max_workspace_bytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME_VALUE(preference_min_alignment_b_bytes, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
SAME_VALUE(preference_min_alignment_c_bytes, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
SAME_VALUE(preference_min_alignment_d_bytes, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
#if CUBLAS_VERSION >= 120900
SAME_VALUE(desc_a_scale_mode, CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
SAME_VALUE(desc_b_scale_mode, CUBLASLT_MATMUL_DESC_B_SCALE_MODE);
SAME_VALUE(scale_mode_outer_vector, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
#endif

static_assert(sizeof(ours::Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(ours::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(ours::HeuristicResult, workspace_bytes) ==
              offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(ours::HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(ours::HeuristicResult, waves_count) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
static_assert(sizeof(ours::Status) == sizeof(cublasStatus_t));
static_assert(sizeof(ours::ComputeType) == sizeof(cublasComputeType_t));
static_assert(sizeof(ours::DescAttribute) == sizeof(cublasLtMatmulDescAttributes_t));
static_assert(sizeof(ours::PreferenceAttribute) == sizeof(cublasLtMatmulPreferenceAttributes_t));

int main() { std::printf("cublaslt-api.h agrees with cublasLt.h of %d\n", CUBLAS_VERSION); }
