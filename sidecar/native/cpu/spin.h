// A bounded spin before sleep: handing work over then takes a fraction of a microsecond instead of a system call and
// a wake-up, and a core is never held for long.

#pragma once

#include <chrono>
#include <cstdint>

namespace kvs {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/** True as soon as `condition` holds; false after about `microseconds`. */
template <class Condition>
bool spin_until(const Condition& condition, uint32_t microseconds) {
  if (condition()) return true;
  if (microseconds == 0) return false;
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace kvs
