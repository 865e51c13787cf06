// The kernels for AVX-512 F, BW, DQ and VL; where the compiler does not target them there is no table.

#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

// GCC's own intrinsics warn of values that they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace kvs {

namespace {
#include "kernels/simd.h"
#include "kernels/rows.h"
#include "kernels/matmul.h"
#include "kernels/append-kv.h"
#include "kernels/transpose.h"
#include "kernels/attention.h"
#include "kernels/table.h"

constexpr Kernels table = table_of("avx512");
}  // namespace

const Kernels* avx512_kernels() { return &table; }

}  // namespace kvs

#else

const kvs::Kernels* kvs::avx512_kernels() { return nullptr; }

#endif
