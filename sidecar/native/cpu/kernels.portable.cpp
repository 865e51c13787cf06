// The kernels in the compiler's own vectors of four floats: for every processor.

#include "half.h"
#include "kernels.h"

namespace kvs {

namespace {
#include "kernels/simd.h"
#include "kernels/rows.h"
#include "kernels/matmul.h"
#include "kernels/append-kv.h"
#include "kernels/transpose.h"
#include "kernels/attention.h"
#include "kernels/table.h"

constexpr Kernels table = table_of("portable");
}  // namespace

const Kernels* portable_kernels() { return &table; }

}  // namespace kvs
