// The kernels for AVX2, FMA and F16C; where the compiler does not target them there is no table.

#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

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

constexpr Kernels table = table_of("avx2");
}  // namespace

const Kernels* avx2_kernels() { return &table; }

}  // namespace kvs

#else

const kvs::Kernels* kvs::avx2_kernels() { return nullptr; }

#endif
