// The groups of checks. Each draws fresh inputs from `random` and notes what it saw in `report`.

#pragma once

#include <cstdarg>
#include <string>

#include "comparison.h"
#include "side.h"

namespace check {

struct Context {
  const Library& cpu;
  const Library& cuda;
  Report& report;
  Random& random;
  /** Few and small cases, for runs under a memory checker. */
  bool is_small;
};

void check_rows(Context& context);
void check_matmul(Context& context);
void check_chains(Context& context);
void check_attention(Context& context);
void check_sampling(Context& context);
void check_streams(Context& context);
void check_refusals(Context& context);

inline constexpr kvs_dtype compute_dtypes[] = {KVS_F32, KVS_F16, KVS_BF16};

/** The same configuration for the CPU library, which computes in F32. */
inline kvs_device_config for_cpu(kvs_device_config config) {
  config.compute_dtype = KVS_F32;
  return config;
}

inline std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char* format, ...) {
  char buffer[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace check
