// By system calls: libnuma would be a dependency for these three.

#include "numa-preference.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace kvs {

namespace {

constexpr int nodes_max = 1024;
constexpr int mask_bits = 8 * sizeof(unsigned long);

}  // namespace

NumaPreference::NumaPreference(int node) {
  if (node < 0 || node >= nodes_max) return;
  int mode = MPOL_DEFAULT;
  if (syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0) != 0 || mode != MPOL_DEFAULT) return;
  unsigned long mask[nodes_max / mask_bits] = {};
  mask[node / mask_bits] = 1ul << (node % mask_bits);
  is_set_ = syscall(SYS_set_mempolicy, MPOL_PREFERRED, mask, nodes_max + 1) == 0;
}

NumaPreference::~NumaPreference() {
  if (is_set_) syscall(SYS_set_mempolicy, MPOL_DEFAULT, nullptr, 0);
}

}  // namespace kvs
