// Parts of a sum that thread blocks leave one another in memory without flags: the memory holds zeros, no part has a
// zero (it becomes -0), so a value that is not zero has been written; the reader puts the zeros back. That saves a
// fence and two round trips to memory. Who waits must know that those it waits for run, or have run.

#pragma once

#include <cstdint>

namespace kvs {

__device__ __forceinline__ uint32_t part_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits == 0 ? 0x80000000u : bits;
}
__device__ __forceinline__ void leave_part(float* to, const float4& value) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(part_bits(value.x)),
               "r"(part_bits(value.y)), "r"(part_bits(value.z)), "r"(part_bits(value.w))
               : "memory");
}
__device__ __forceinline__ void leave_part(float2* to, const float2& value) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(part_bits(value.x)),
               "r"(part_bits(value.y))
               : "memory");
}
__device__ __forceinline__ float4 look_at_part(const float4* from) {
  float4 value;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from)
               : "memory");
  return value;
}
__device__ __forceinline__ float2 look_at_part(const float2* from) {
  float2 value;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ bool is_there(const float4& part) {
  return __float_as_uint(part.x) != 0 && __float_as_uint(part.y) != 0 && __float_as_uint(part.z) != 0 &&
         __float_as_uint(part.w) != 0;
}
__device__ __forceinline__ bool is_there(const float2& state) {
  return __float_as_uint(state.x) != 0 && __float_as_uint(state.y) != 0;
}

}  // namespace kvs
