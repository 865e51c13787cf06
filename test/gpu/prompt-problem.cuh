// Gate and up of many rows to check: random operands and results between zones of NaN, and plain double arithmetic to
// compare with.

#pragma once

#include <cmath>

#include "../../sidecar/native/cuda/skinny-matmul.h"
#include "gpu-bench.cuh"

namespace bench {

struct Shape {
  uint32_t rows;
  uint32_t outputs;
  uint32_t inputs;
  kvs_dtype dtype = KVS_BF16;
  bool has_bias = false;

  uint32_t columns() const { return outputs / 2; }
};

/** Memory between two zones of NaN that nobody may read or write. */
class Guarded {
 public:
  explicit Guarded(uint64_t count) : count_(count), memory_(count + 2 * guard) { memory_.fill_bytes(0xff); }
  uint16_t* get() const { return memory_.get() + guard; }
  void poison() { memory_.fill_bytes(0xff); }
  void fill(kvs_dtype dtype, uint64_t seed, float deviation) {
    if (dtype == KVS_BF16) {
      bench::randomize(reinterpret_cast<__nv_bfloat16*>(get()), count_, seed, deviation);
    } else {
      bench::randomize(reinterpret_cast<__half*>(get()), count_, seed, deviation);
    }
  }
  /** Without the guards; is_intact: nobody wrote to them. */
  std::vector<uint16_t> host(bool& is_intact) const {
    const std::vector<uint16_t> all = memory_.host();
    const auto is_poison = [](uint16_t bits) { return bits == 0xffff; };
    is_intact = std::all_of(all.begin(), all.begin() + guard, is_poison) &&
                std::all_of(all.end() - guard, all.end(), is_poison);
    return {all.begin() + guard, all.end() - guard};
  }

 private:
  static constexpr uint64_t guard = 64 * 1024;
  uint64_t count_;
  Device<uint16_t> memory_;
};

__device__ double value_of(const void* values, kvs_dtype dtype, uint64_t at) {
  if (dtype == KVS_F16) return __half2float(static_cast<const __half*>(values)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[at]);
}
__device__ double product_of(const kvs::SkinnyProduct& a, uint64_t row, uint64_t output) {
  double sum = a.bias == nullptr ? 0 : a.bias[output];
  for (uint64_t k = 0; k < a.inputs; ++k) {
    sum += value_of(a.x, a.x_dtype, row * a.inputs + k) * value_of(a.weight, a.x_dtype, output * a.inputs + k);
  }
  return sum;
}
__global__ void reference_product(double* gated, const kvs::SkinnyProduct a) {
  const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint32_t columns = a.outputs / 2;
  if (i >= static_cast<uint64_t>(a.rows) * columns) return;
  const uint64_t row = i / columns;
  const uint64_t column = i % columns;
  const double gate = product_of(a, row, column);
  const double up = product_of(a, row, columns + column);
  gated[i] = gate / (1 + exp(-gate)) * up;
}

class Problem {
 public:
  Problem(const Shape& shape, uint64_t seed)
      : shape_(shape),
        x_(static_cast<uint64_t>(shape.rows) * shape.inputs),
        weight_(static_cast<uint64_t>(shape.outputs) * shape.inputs),
        gated_(static_cast<uint64_t>(shape.rows) * shape.columns()),
        bias_(shape.outputs) {
    x_.fill(shape.dtype, seed, 1.0f);
    weight_.fill(shape.dtype, seed + 1, 2.0f / std::sqrt(static_cast<float>(shape.inputs)));
    bench::randomize(bias_.get(), shape.outputs, seed + 2);
  }

  /** Results are NaN again. */
  void poison() { gated_.poison(); }
  /** y stays null: nobody writes it. */
  kvs::SkinnyProduct product() const {
    kvs::SkinnyProduct a = {};
    a.x = x_.get();
    a.weight = weight_.get();
    a.bias = shape_.has_bias ? bias_.get() : nullptr;
    a.y_dtype = a.x_dtype = a.weight_dtype = shape_.dtype;
    a.rows = shape_.rows;
    a.outputs = shape_.outputs;
    a.inputs = shape_.inputs;
    a.gated = gated_.get();
    return a;
  }
  std::vector<uint16_t> result(bool& is_intact) const { return gated_.host(is_intact); }

 private:
  Shape shape_;
  Guarded x_;
  Guarded weight_;
  Guarded gated_;
  Device<float> bias_;
};

/** The worst row's error, and whether each value is as near as roundings leave it. NaN is neither. */
struct Errors {
  double row = 0;
  bool are_values_near = true;

  Errors(const Shape& shape, const std::vector<uint16_t>& got, const std::vector<double>& want) {
    const uint64_t columns = shape.columns();
    const double ulp = shape.dtype == KVS_F16 ? 0x1p-11 : 0x1p-8;
    for (uint64_t begin = 0; begin < got.size(); begin += columns) {
      double error = 0, norm = 0;
      for (uint64_t i = begin; i < begin + columns; ++i) {
        const double difference = half_value(got[i], shape.dtype) - want[i];
        error += difference * difference;
        norm += want[i] * want[i];
      }
      const double typical = std::sqrt(norm / columns);
      for (uint64_t i = begin; i < begin + columns; ++i) {
        const double difference = std::abs(half_value(got[i], shape.dtype) - want[i]);
        if (!(difference <= 4 * ulp * std::abs(want[i]) + ulp * typical)) are_values_near = false;
      }
      if (!(std::sqrt(error / norm) <= row)) row = std::sqrt(error / norm);
    }
  }
};

}  // namespace bench
