// Element types of device memory, for kernels: conversion to and from F32, vectors of 16 bytes, dispatch by
// kvs_dtype.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "../common/failure.h"
#include "../kvasir.h"

namespace kvs {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__nv_fp8_e4m3 value) { return static_cast<float>(value); }

/** Round to nearest, ties to even. */
template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
/** Saturates at 448. */
template <>
__device__ inline __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float value) {
  return __nv_fp8_e4m3(value);
}

inline constexpr float f8_max = 448.0f;

/** 16 bytes of T in registers. */
template <class T>
struct alignas(16) Vector {
  static constexpr uint32_t size = 16 / sizeof(T);
  T values[size];
};

/** body(T()) with the type that dtype names: F32, F16 or BF16. */
template <class Body>
void with_type(kvs_dtype dtype, Body&& body) {
  switch (dtype) {
    case KVS_F32: return body(float());
    case KVS_F16: return body(__half());
    case KVS_BF16: return body(__nv_bfloat16());
    default: fail(KVS_UNSUPPORTED, "dtype %u is not one of F32, F16, BF16", dtype);
  }
}

/** The same, with F8E4M3. */
template <class Body>
void with_stored_type(kvs_dtype dtype, Body&& body) {
  if (dtype == KVS_F8E4M3) return body(__nv_fp8_e4m3());
  with_type(dtype, body);
}

inline bool is_aligned(const void* pointer, uint64_t bytes) {
  return reinterpret_cast<uint64_t>(pointer) % bytes == 0;
}

}  // namespace kvs
