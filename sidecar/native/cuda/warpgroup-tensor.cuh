// A warpgroup's tensor-core products (wgmma, sm_90a) and the tensor copy engine that feeds them: wrappers over PTX,
// with the descriptors of 128-byte swizzled tiles (PTX ISA 9.7.15: matrix descriptor, canonical layouts).

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvs {

// ---- barriers --------------------------------------------------------------------------------------

/** A barrier of `threads` threads of the block by number. */
__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
/** Makes this thread's ordinary writes to shared memory visible to the tensor cores and the copy engine. */
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- the tensor copy engine ---------------------------------------------------------------------------

__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& map, int column, int row, int matrix,
                                          int block, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(block), "r"(barrier)
      : "memory");
}
/** See read_once_policy(). */
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& map, int column, int row, int matrix,
                                          int block, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, "
      "%4, %5}], [%6], %7;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(block), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- products ------------------------------------------------------------------------------------------

/** Descriptor of a tile of 128-byte rows, swizzled, its start 1024-byte aligned: groups of 8 rows are 1024 bytes apart;
 * panel_bytes apart are the next 64 columns of a transposed operand. */
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t swizzle_128 = 1ull << 62;
  constexpr uint64_t rows_of_8 = 1024 / 16;
  return swizzle_128 | rows_of_8 << 32 | static_cast<uint64_t>(panel_bytes / 16) << 16 | (address & 0x3ffff) / 16;
}

/** The same, so many bytes on: the address has the lower half to itself, and no carry. */
__device__ __forceinline__ uint64_t descriptor_at(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + bytes / 16;
  return (descriptor & 0xffffffff00000000ull) | low;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
/** Keeps the compiler from moving uses of the accumulators over a wait. */
template <int count>
__device__ __forceinline__ void keep_in_place(float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int count>
__device__ __forceinline__ void keep_in_place(uint32_t (&values)[count][4]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(values[i][j])::"memory");
  }
}

// clang-format off
#define KVS_FLOATS_4_AT(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define KVS_FLOATS_8_AT(c, i) KVS_FLOATS_4_AT(c, i), KVS_FLOATS_4_AT(c, i + 4)
#define KVS_FLOATS_4(c) KVS_FLOATS_4_AT(c, 0)
#define KVS_FLOATS_8(c) KVS_FLOATS_8_AT(c, 0)
#define KVS_FLOATS_16(c) KVS_FLOATS_8(c), KVS_FLOATS_8_AT(c, 8)
#define KVS_FLOATS_24(c) KVS_FLOATS_16(c), KVS_FLOATS_8_AT(c, 16)
#define KVS_FLOATS_32(c) KVS_FLOATS_24(c), KVS_FLOATS_8_AT(c, 24)
#define KVS_FLOATS_64(c) \
  KVS_FLOATS_32(c), KVS_FLOATS_8_AT(c, 32), KVS_FLOATS_8_AT(c, 40), KVS_FLOATS_8_AT(c, 48), KVS_FLOATS_8_AT(c, 56)
#define KVS_REGISTERS_4 "%0,%1,%2,%3"
#define KVS_REGISTERS_8 KVS_REGISTERS_4 ",%4,%5,%6,%7"
#define KVS_FLOATS_128(c) \
  KVS_FLOATS_64(c), KVS_FLOATS_8_AT(c, 64), KVS_FLOATS_8_AT(c, 72), KVS_FLOATS_8_AT(c, 80), KVS_FLOATS_8_AT(c, 88), \
  KVS_FLOATS_8_AT(c, 96), KVS_FLOATS_8_AT(c, 104), KVS_FLOATS_8_AT(c, 112), KVS_FLOATS_8_AT(c, 120)
#define KVS_REGISTERS_16 KVS_REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define KVS_REGISTERS_24 KVS_REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define KVS_REGISTERS_32 KVS_REGISTERS_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define KVS_REGISTERS_64 \
  KVS_REGISTERS_32 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KVS_REGISTERS_128 \
  KVS_REGISTERS_64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81" \
  ",%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99" \
  ",%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115" \
  ",%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// clang-format on

/** c (64 x N) = or += a (64 x 16) b^T (N x 16), both in shared memory, rows of K contiguous. */
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[4], uint64_t a, uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[8], uint64_t a, uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[16], uint64_t a, uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[24], uint64_t a, uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[32], uint64_t a, uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[64], uint64_t a, uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_shared(float (&c)[128], uint64_t a, uint64_t b, bool is_adding);
/** The same with a in registers. */
template <typename T>
__device__ __forceinline__ void multiply_mixed(float (&c)[4], const uint32_t (&a)[4], uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_mixed(float (&c)[8], const uint32_t (&a)[4], uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_mixed(float (&c)[16], const uint32_t (&a)[4], uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_mixed(float (&c)[24], const uint32_t (&a)[4], uint64_t b, bool is_adding);
template <typename T>
__device__ __forceinline__ void multiply_mixed(float (&c)[32], const uint32_t (&a)[4], uint64_t b, bool is_adding);
/** c (64 x N) += a (64 x 16, registers) b (16 x N, shared memory, rows of N contiguous). */
template <typename T>
__device__ __forceinline__ void multiply_registers(float (&c)[32], const uint32_t (&a)[4], uint64_t b);
template <typename T>
__device__ __forceinline__ void multiply_registers(float (&c)[64], const uint32_t (&a)[4], uint64_t b);

// N = 2 count; A, B, ... are the numbers of the operands behind c.
#define KVS_DEFINE_SHARED(T, NAME, N, count, A, B, C)                                                             \
  template <>                                                                                                     \
  __device__ __forceinline__ void multiply_shared<T>(float (&c)[count], uint64_t a, uint64_t b, bool is_adding) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" C                                                       \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." NAME "." NAME " {" KVS_REGISTERS_##count   \
                 "}, %" A ", %" B ", add, 1, 1, 0, 0;\n}"                                                         \
                 : KVS_FLOATS_##count(c)                                                                          \
                 : "l"(a), "l"(b), "r"(static_cast<int>(is_adding)));                                             \
  }
#define KVS_DEFINE_MIXED(T, NAME, N, count, A, B, C, D, E, F)                                                       \
  template <>                                                                                                       \
  __device__ __forceinline__ void multiply_mixed<T>(float (&c)[count], const uint32_t (&a)[4], uint64_t b,          \
                                                    bool is_adding) {                                               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" F                                                         \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." NAME "." NAME " {" KVS_REGISTERS_##count     \
                 "}, {%" A ",%" B ",%" C ",%" D "}, %" E ", add, 1, 1, 0;\n}"                                       \
                 : KVS_FLOATS_##count(c)                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(is_adding)));           \
  }
#define KVS_DEFINE_REGISTERS(T, NAME, N, count, A, B, C, D, E)                                                \
  template <>                                                                                                 \
  __device__ __forceinline__ void multiply_registers<T>(float (&c)[count], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" N             \
                 "k16.f32." NAME "." NAME " {" KVS_REGISTERS_##count "}, {%" A ",%" B ",%" C ",%" D "}, %" E  \
                 ", add, 1, 1, 1;\n}"                                                                         \
                 : KVS_FLOATS_##count(c)                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
  }
#define KVS_DEFINE_PRODUCTS(T, NAME)                                             \
  KVS_DEFINE_SHARED(T, NAME, "8", 4, "4", "5", "6")                              \
  KVS_DEFINE_SHARED(T, NAME, "16", 8, "8", "9", "10")                            \
  KVS_DEFINE_SHARED(T, NAME, "32", 16, "16", "17", "18")                         \
  KVS_DEFINE_SHARED(T, NAME, "48", 24, "24", "25", "26")                         \
  KVS_DEFINE_SHARED(T, NAME, "64", 32, "32", "33", "34")                         \
  KVS_DEFINE_SHARED(T, NAME, "128", 64, "64", "65", "66")                        \
  KVS_DEFINE_MIXED(T, NAME, "8", 4, "4", "5", "6", "7", "8", "9")                \
  KVS_DEFINE_SHARED(T, NAME, "256", 128, "128", "129", "130")                    \
  KVS_DEFINE_MIXED(T, NAME, "16", 8, "8", "9", "10", "11", "12", "13")           \
  KVS_DEFINE_MIXED(T, NAME, "32", 16, "16", "17", "18", "19", "20", "21")        \
  KVS_DEFINE_MIXED(T, NAME, "48", 24, "24", "25", "26", "27", "28", "29")        \
  KVS_DEFINE_MIXED(T, NAME, "64", 32, "32", "33", "34", "35", "36", "37")        \
  KVS_DEFINE_REGISTERS(T, NAME, "64", 32, "32", "33", "34", "35", "36")          \
  KVS_DEFINE_REGISTERS(T, NAME, "128", 64, "64", "65", "66", "67", "68")

KVS_DEFINE_PRODUCTS(__nv_bfloat16, "bf16")
KVS_DEFINE_PRODUCTS(__half, "f16")

#undef KVS_DEFINE_PRODUCTS
#undef KVS_DEFINE_REGISTERS
#undef KVS_DEFINE_MIXED
#undef KVS_DEFINE_SHARED
#undef KVS_REGISTERS_128
#undef KVS_REGISTERS_64
#undef KVS_REGISTERS_32
#undef KVS_REGISTERS_24
#undef KVS_REGISTERS_16
#undef KVS_REGISTERS_8
#undef KVS_REGISTERS_4
#undef KVS_FLOATS_128
#undef KVS_FLOATS_64
#undef KVS_FLOATS_32
#undef KVS_FLOATS_24
#undef KVS_FLOATS_16
#undef KVS_FLOATS_8
#undef KVS_FLOATS_4
#undef KVS_FLOATS_8_AT
#undef KVS_FLOATS_4_AT

}  // namespace kvs
