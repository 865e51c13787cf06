// How outputs are compared: row by row, relative to the row's norm and to the ulps of its largest element. NaN never
// passes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "number-types.h"

namespace check {

/** Row error ||y - ref|| / ||ref||, and ulps of the row's largest |ref|. */
struct Limits {
  double row_error;
  double ulps;
};

/** Of an output in `dtype` that sums up to `terms` products per element. */
inline Limits limits_of(kvs_dtype dtype, double terms) {
  if (dtype == KVS_F32) return {1e-5 * std::sqrt(terms), 1e9};
  return {dtype == KVS_BF16 ? 5e-3 : 1e-3, 4.0};
}

struct Worst {
  uint32_t cases = 0;
  uint32_t failures = 0;
  double row_error = 0.0;
  double ulps = 0.0;
};

class Report {
 public:
  void rows(const std::string& what, const std::string& of_case, kvs_dtype dtype, const std::vector<float>& y,
            const std::vector<float>& reference, size_t row_size, const Limits& limits) {
    Worst worst_here;
    bool has_nan = y.size() != reference.size() || y.empty();
    for (size_t begin = 0; begin < reference.size() && !has_nan; begin += row_size) {
      double norm = 0.0, difference = 0.0, largest = 0.0, largest_difference = 0.0;
      for (size_t i = begin; i < begin + row_size; ++i) {
        const double d = static_cast<double>(y[i]) - reference[i];
        if (!std::isfinite(y[i])) has_nan = true;
        difference += d * d;
        norm += static_cast<double>(reference[i]) * reference[i];
        largest = std::max(largest, std::fabs(static_cast<double>(reference[i])));
        largest_difference = std::max(largest_difference, std::fabs(d));
      }
      const double error = norm > 0.0 ? std::sqrt(difference / norm) : std::sqrt(difference);
      worst_here.row_error = std::max(worst_here.row_error, error);
      worst_here.ulps = std::max(worst_here.ulps, largest_difference / ulp_at(largest, dtype));
    }
    const bool passed = !has_nan && worst_here.row_error <= limits.row_error && worst_here.ulps <= limits.ulps;
    if (!passed) {
      std::printf("FAILED %s %s: row error %.3g (limit %.3g), %.2f ulps (limit %.3g)%s\n", what.c_str(),
                  of_case.c_str(), worst_here.row_error, limits.row_error, worst_here.ulps, limits.ulps,
                  has_nan ? ", not finite" : "");
    }
    note(what + " " + name_of(dtype), passed, worst_here.row_error, worst_here.ulps);
  }

  void that(const std::string& what, const std::string& of_case, bool passed) {
    if (!passed) std::printf("FAILED %s %s\n", what.c_str(), of_case.c_str());
    note(what, passed, 0.0, 0.0);
  }

  /** A failed case that threw. */
  void threw(const std::string& what, const std::string& of_case, const char* error) {
    std::printf("FAILED %s %s: %s\n", what.c_str(), of_case.c_str(), error);
    note(what, false, 0.0, 0.0);
  }

  /** Prints the table; the number of failures. */
  uint32_t finish() const {
    uint32_t cases = 0, failures = 0;
    std::printf("\n%-34s %7s %7s %12s %9s\n", "what", "cases", "failed", "row error", "ulps");
    for (const auto& [what, worst] : worst_) {
      std::printf("%-34s %7u %7u %12.3g %9.2f\n", what.c_str(), worst.cases, worst.failures, worst.row_error,
                  worst.ulps);
      cases += worst.cases;
      failures += worst.failures;
    }
    std::printf("%u passed, %u failed\n", cases - failures, failures);
    return failures;
  }

 private:
  void note(const std::string& what, bool passed, double row_error, double ulps) {
    Worst& worst = worst_[what];
    ++worst.cases;
    worst.failures += passed ? 0 : 1;
    worst.row_error = std::max(worst.row_error, row_error);
    worst.ulps = std::max(worst.ulps, ulps);
  }

  std::map<std::string, Worst> worst_;
};

}  // namespace check
