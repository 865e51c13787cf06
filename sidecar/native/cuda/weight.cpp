// Weights on their way to the device: through page-locked pieces, converted there when types differ.

#include "weight.h"

#include <algorithm>
#include <cmath>

#include "convert.h"
#include "device.h"

using kvs::require;
using kvs::with_device;

namespace kvs {

namespace {

/** Rows [begin, begin + count) of the matrix, from device memory in another type. */
void store_rows(kvs_device& device, kvs_weight& weight, uint32_t begin, uint32_t count, const void* source,
                kvs_dtype source_dtype) {
  char* to = weight.memory.as() + begin * weight.row_bytes();
  const cudaStream_t stream = device.compute_stream();
  if (weight.dtype == KVS_F8E4M3) {
    quantise_rows(to, weight.scales.as<float>() + begin, source, source_dtype, count, weight.cols, stream);
  } else {
    convert(to, weight.dtype, source, source_dtype, static_cast<uint64_t>(count) * weight.cols, stream);
  }
}

void upload_converted(kvs_device& device, kvs_weight& weight, uint32_t row_begin, uint32_t row_count,
                      const char* source, kvs_dtype source_dtype) {
  const uint64_t row_bytes = static_cast<uint64_t>(weight.cols) * dtype_bytes(source_dtype);
  const uint32_t rows_at_once = static_cast<uint32_t>(
      std::clamp<uint64_t>(device.staging.piece_bytes() / row_bytes, 1, row_count));
  // Used in stream order, so one buffer serves all pieces; upload is blocking, so it may go at the end.
  const DeviceMemory raw(rows_at_once * row_bytes, "the upload of weights");
  for (uint32_t done = 0; done < row_count; done += rows_at_once) {
    const uint32_t count = std::min(rows_at_once, row_count - done);
    device.staging.copy_to_device(raw.as(), source + done * row_bytes, count * row_bytes, device.compute_stream());
    store_rows(device, weight, row_begin + done, count, raw.as(), source_dtype);
  }
  device.drain_compute();
}

}  // namespace
}  // namespace kvs

extern "C" {

kvs_status kvs_weight_create(kvs_device* device, uint32_t rows, uint32_t cols, kvs_dtype dtype, kvs_weight** out) {
  return with_device(device, [&](kvs_device& d) {
    require(out != nullptr && rows > 0 && cols > 0, "weight: rows and cols must be positive, out not null");
    require(rows <= (1u << 28) && cols <= (1u << 24), "weight: (%u, %u) is too large", rows, cols);
    require(dtype <= KVS_F8E4M3, "weight: dtype %u", dtype);
    auto weight = std::make_unique<kvs_weight>(rows, cols, dtype);
    d.matmuls.prepare(*weight);
    d.weights.insert(weight.get());
    *out = weight.release();
  });
}

kvs_status kvs_weight_upload(kvs_device* device, kvs_weight* weight, uint32_t row_begin, uint32_t row_count,
                             const void* source, kvs_dtype source_dtype) {
  return with_device(device, [&](kvs_device& d) {
    kvs_weight& w = d.known(weight);
    d.require_no_capture("kvs_weight_upload");
    require(source != nullptr && source_dtype <= KVS_BF16, "weight: source must be F32, F16 or BF16");
    require(row_count > 0 && row_begin <= w.rows && row_count <= w.rows - row_begin, "weight: rows [%u, +%u) of %u",
            row_begin, row_count, w.rows);
    const char* from = static_cast<const char*>(source);
    if (source_dtype != w.dtype) {
      kvs::upload_converted(d, w, row_begin, row_count, from, source_dtype);
      return;
    }
    d.staging.copy_to_device(w.memory.as() + row_begin * w.row_bytes(), from, row_count * w.row_bytes(),
                             d.compute_stream());
  });
}

kvs_status kvs_weight_fill_random(kvs_device* device, kvs_weight* weight, uint64_t seed, float deviation) {
  return with_device(device, [&](kvs_device& d) {
    kvs_weight& w = d.known(weight);
    d.require_no_capture("kvs_weight_fill_random");
    require(std::isfinite(deviation) && deviation >= 0.0f, "weight: deviation must be finite and not negative");
    kvs::fill_random(w.memory.as(), w.scales.as<float>(), w.dtype, w.rows, w.cols, seed, deviation,
                     d.compute_stream());
    d.drain_compute();  // as an upload: products read weights before they wait for the kernels ahead
  });
}

kvs_status kvs_weight_free(kvs_device* device, kvs_weight* weight) {
  return with_device(device, [&](kvs_device& d) {
    d.known(weight);
    d.require_no_capture("kvs_weight_free");
    d.drain_compute();
    d.weights.erase(weight);
    delete weight;
  });
}

}  // extern "C"
