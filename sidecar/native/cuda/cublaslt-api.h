// The part of cuBLASLt that we call, declared here so that neither its headers nor its libraries are needed to build:
// the library is loaded when a device opens. test/gpu/cublaslt-header-check.cu compares sizes and values with the
// real header.

#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace kvs::cublaslt {

using Handle = struct HandleTag*;
using MatmulDesc = struct MatmulDescTag*;
using MatrixLayout = struct MatrixLayoutTag*;
using Preference = struct PreferenceTag*;

using Status = int;
inline constexpr Status status_success = 0;
inline constexpr Status status_not_supported = 15;

using ComputeType = int;
inline constexpr ComputeType compute_32f = 68;

inline constexpr int32_t operation_n = 0;
inline constexpr int32_t operation_t = 1;

/** Attributes of a MatmulDesc. */
enum DescAttribute : int {
  desc_trans_a = 3,
  desc_trans_b = 4,
  desc_epilogue = 7,
  desc_bias_pointer = 8,
  desc_a_scale_pointer = 17,
  desc_b_scale_pointer = 18,
  desc_fast_accumulation = 25,
  desc_bias_data_type = 26,
  desc_a_scale_mode = 31,
  desc_b_scale_mode = 32,
};

inline constexpr uint32_t epilogue_default = 1;
inline constexpr uint32_t epilogue_bias = 4;

inline constexpr int32_t scale_mode_outer_vector = 3;

enum PreferenceAttribute : int {
  preference_max_workspace_bytes = 1,
  preference_min_alignment_b_bytes = 6,
  preference_min_alignment_c_bytes = 7,
  preference_min_alignment_d_bytes = 8,
};

/** A chosen kernel and its settings; plain bytes, valid for the library version and GPU that gave them. */
struct Algorithm {
  uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves_count;
  int reserved[4];
};

/** Entry points of the loaded library. */
struct Api {
  size_t (*get_version)();
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  Status (*desc_create)(MatmulDesc*, ComputeType, cudaDataType_t scale_type);
  Status (*desc_destroy)(MatmulDesc);
  Status (*desc_set)(MatmulDesc, DescAttribute, const void*, size_t);
  Status (*layout_create)(MatrixLayout*, cudaDataType_t, uint64_t rows, uint64_t cols, int64_t leading_dimension);
  Status (*layout_destroy)(MatrixLayout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*get_heuristic)(Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c, MatrixLayout d,
                          Preference, int requested, HeuristicResult*, int* returned);
  Status (*check)(Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c, MatrixLayout d,
                  const Algorithm*, HeuristicResult*);
  Status (*matmul)(Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout, const void* b, MatrixLayout,
                   const void* beta, const void* c, MatrixLayout, void* d, MatrixLayout, const Algorithm*,
                   void* workspace, size_t workspace_bytes, cudaStream_t);
};

/** Loads the library once per process. Throws Failure(KVS_UNSUPPORTED) that says where it was looked for. */
const Api& api();

}  // namespace kvs::cublaslt
