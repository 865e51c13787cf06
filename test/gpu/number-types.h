// The element types of the ABI on the host, and what an ulp is in each.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../sidecar/native/cpu/half.h"

namespace check {

inline uint32_t bytes_of(kvs_dtype dtype) { return dtype == KVS_F32 ? 4 : dtype == KVS_F8E4M3 ? 1 : 2; }
inline const char* name_of(kvs_dtype dtype) {
  return dtype == KVS_F32 ? "f32" : dtype == KVS_F16 ? "f16" : dtype == KVS_BF16 ? "bf16" : "f8";
}

inline float rounded(float value, kvs_dtype dtype) {
  if (dtype == KVS_F16) return kvs::float_of_f16(kvs::f16_of_float(value));
  if (dtype == KVS_BF16) return kvs::float_of_bf16(kvs::bf16_of_float(value));
  return value;
}

inline std::vector<char> encoded(const std::vector<float>& values, kvs_dtype dtype) {
  std::vector<char> bytes(values.size() * bytes_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) kvs::store_element(bytes.data(), i, dtype, values[i]);
  return bytes;
}

inline std::vector<float> decoded(const void* data, size_t count, kvs_dtype dtype) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = kvs::load_element(data, i, dtype);
  return values;
}

/** Distance of neighbouring numbers at this magnitude. */
inline double ulp_at(double magnitude, kvs_dtype dtype) {
  const int digits = dtype == KVS_BF16 ? 7 : dtype == KVS_F16 ? 10 : 23;
  if (magnitude == 0.0) return std::ldexp(1.0, -40);
  return std::ldexp(1.0, static_cast<int>(std::floor(std::log2(magnitude))) - digits);
}

}  // namespace check
