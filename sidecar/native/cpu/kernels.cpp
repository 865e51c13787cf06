// Which instruction set this processor runs.

#include "kernels.h"

#include "../common/failure.h"

namespace kvs {

namespace {

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

}  // namespace

const Kernels& select_kernels(uint32_t isa) {
  const Kernels* avx512 = has_avx512() ? avx512_kernels() : nullptr;
  const Kernels* avx2 = has_avx2() ? avx2_kernels() : nullptr;
  const Kernels* chosen = nullptr;
  switch (isa) {
    case KVS_ISA_BEST: chosen = avx512 != nullptr ? avx512 : avx2 != nullptr ? avx2 : portable_kernels(); break;
    case KVS_ISA_AVX512: chosen = avx512; break;
    case KVS_ISA_AVX2: chosen = avx2; break;
    case KVS_ISA_PORTABLE: chosen = portable_kernels(); break;
    default: fail(KVS_INVALID, "isa: %u", isa);
  }
  if (chosen == nullptr) fail(KVS_UNSUPPORTED, "this processor does not have the instruction set that was asked for");
  return *chosen;
}

}  // namespace kvs
