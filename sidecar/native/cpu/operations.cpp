// The compute stream's operations: arguments are checked and captured here, on the caller's thread; the kernels run
// on the compute stream, cut into items for the thread pool.

#include <algorithm>
#include <cstring>

#include "device.h"
#include "sampling.h"

using kvs::checked;
using kvs::enqueue;
using kvs::f32_bytes;
using kvs::guard;
using kvs::require;

namespace {

/** Row kernels: below this many floats an operation is not worth waking other threads for. */
constexpr uint64_t item_floats = 16384;

void check_rows(const kvs_device& device, uint32_t row_count) {
  require(row_count > 0 && row_count <= device.config.max_rows, "%u rows, 1 to %u", row_count, device.config.max_rows);
}

/** Operations that read the step: it must have begun and be of this size. */
void check_step_rows(const kvs_device& device, uint32_t row_count) {
  check_rows(device, row_count);
  require(row_count == device.begun_step.row_count, "%u rows, but the step that has begun has %u", row_count,
          device.begun_step.row_count);
}

void check_layer(const kvs_device& device, uint32_t layer) {
  require(layer < device.config.layers, "no layer %u of %u", layer, device.config.layers);
  require(device.block_count > 0, "there are no KV blocks: kvs_kv_create first");
  require(device.config.rotary_dim == 0 || device.has_rope, "the RoPE table is missing: kvs_set_rope first");
}

/** kernel(row) for every row, some rows an item. */
template <class Kernel>
void for_rows(kvs::ThreadPool& pool, uint32_t row_count, uint64_t floats_per_row, const Kernel& kernel) {
  const uint64_t rows_per_item = std::max<uint64_t>(1, item_floats / std::max<uint64_t>(1, floats_per_row));
  const uint32_t items = static_cast<uint32_t>((row_count + rows_per_item - 1) / rows_per_item);
  pool.run(items, [&](uint32_t item, kvs::Scratch&) {
    const uint64_t begin = item * rows_per_item;
    const uint64_t end = std::min<uint64_t>(row_count, begin + rows_per_item);
    for (uint64_t row = begin; row < end; ++row) kernel(static_cast<uint32_t>(row));
  });
}

}  // namespace

extern "C" {

kvs_status kvs_embed(kvs_device* device, uint64_t y, kvs_weight* weight, uint32_t row_count) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_step_rows(d, row_count);
    const kvs_weight& w = d.known(weight);
    require(w.rows == d.config.vocab_size && w.cols == d.config.hidden_size,
            "embed: the weight is (%u, %u), not (vocab_size, hidden_size)", w.rows, w.cols);
    float* out = d.device_memory(y, f32_bytes(row_count, w.cols), "y");
    return enqueue(d.compute, [&d, out, view = w.view(), row_count] {
      const int32_t* tokens = reinterpret_cast<const int32_t*>(d.tokens.data());
      const kvs::EmbedTask task{out, view, &d.running_step, tokens, d.token_stride()};
      for_rows(d.pool, row_count, view.cols, [&](uint32_t row) { d.kernels.embed(task, row); });
    });
  });
}

kvs_status kvs_rms_norm(kvs_device* device, uint64_t y, uint64_t x, uint64_t weight, uint32_t row_count, uint32_t size,
                        float epsilon) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_rows(d, row_count);
    require(size > 0 && epsilon >= 0.0f, "rms_norm: size must be positive, epsilon not negative");
    const kvs::NormTask task{d.device_memory(y, f32_bytes(row_count, size), "y"),
                             d.device_memory(x, f32_bytes(row_count, size), "x"),
                             d.device_memory(weight, f32_bytes(1, size), "weight"), nullptr, size, epsilon};
    return enqueue(d.compute, [&d, task, row_count] {
      for_rows(d.pool, row_count, task.size, [&](uint32_t row) { d.kernels.rms_norm(task, row); });
    });
  });
}

kvs_status kvs_layer_norm(kvs_device* device, uint64_t y, uint64_t x, uint64_t weight, uint64_t bias,
                          uint32_t row_count, uint32_t size, float epsilon) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_rows(d, row_count);
    require(size > 0 && epsilon >= 0.0f, "layer_norm: size must be positive, epsilon not negative");
    const float* bias_data = bias == 0 ? nullptr : d.device_memory(bias, f32_bytes(1, size), "bias");
    const kvs::NormTask task{d.device_memory(y, f32_bytes(row_count, size), "y"),
                             d.device_memory(x, f32_bytes(row_count, size), "x"),
                             d.device_memory(weight, f32_bytes(1, size), "weight"), bias_data, size, epsilon};
    return enqueue(d.compute, [&d, task, row_count] {
      for_rows(d.pool, row_count, task.size, [&](uint32_t row) { d.kernels.layer_norm(task, row); });
    });
  });
}

kvs_status kvs_matmul(kvs_device* device, uint64_t y, uint64_t x, kvs_weight* weight, uint64_t bias, uint32_t row_count,
                      uint32_t flags) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_rows(d, row_count);
    const kvs_weight& w = d.known(weight);
    require((flags & ~(KVS_MATMUL_ACCUMULATE | KVS_MATMUL_F32_OUT)) == 0, "matmul: flags %u", flags);
    const kvs::MatmulTask task{d.device_memory(y, f32_bytes(row_count, w.rows), "y"),
                               d.device_memory(x, f32_bytes(row_count, w.cols), "x"),
                               w.view(),
                               bias == 0 ? nullptr : d.device_memory(bias, f32_bytes(1, w.rows), "bias"),
                               row_count,
                               (flags & KVS_MATMUL_ACCUMULATE) != 0,
                               d.pool.thread_count()};
    return enqueue(d.compute, [&d, task] {
      d.pool.run(d.kernels.matmul_items(task), [&](uint32_t item, kvs::Scratch& scratch) {
        d.kernels.matmul(task, item, scratch);
      });
    });
  });
}

kvs_status kvs_append_kv(kvs_device* device, uint64_t q, uint64_t qkv, uint32_t layer, uint64_t q_norm, uint64_t k_norm,
                         uint32_t row_count, float epsilon) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_step_rows(d, row_count);
    check_layer(d, layer);
    require(epsilon >= 0.0f, "append_kv: epsilon must not be negative");
    const kvs_device_config& c = d.config;
    const uint64_t q_size = static_cast<uint64_t>(c.heads) * c.head_dim;
    const uint64_t qkv_size = q_size + 2ull * c.kv_heads * c.head_dim;
    float* q_data = d.device_memory(q, f32_bytes(row_count, q_size), "q");
    const float* qkv_data = d.device_memory(qkv, f32_bytes(row_count, qkv_size), "qkv");
    const float* q_weight = q_norm == 0 ? nullptr : d.device_memory(q_norm, f32_bytes(1, c.head_dim), "q_norm");
    const float* k_weight = k_norm == 0 ? nullptr : d.device_memory(k_norm, f32_bytes(1, c.head_dim), "k_norm");
    const kvs::AppendKvTask task{q_data,  qkv_data,         q_weight,       k_weight,        epsilon,
                                 d.kv_view(layer), d.rope_table(), &d.running_step, &d.config};
    return enqueue(d.compute, [&d, task, row_count, qkv_size] {
      for_rows(d.pool, row_count, qkv_size, [&](uint32_t row) { d.kernels.append_kv(task, row); });
    });
  });
}

kvs_status kvs_attention(kvs_device* device, uint64_t y, uint64_t q, uint32_t layer, uint32_t window,
                         uint32_t row_count) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_step_rows(d, row_count);
    check_layer(d, layer);
    const uint64_t bytes = f32_bytes(row_count, static_cast<uint64_t>(d.config.heads) * d.config.head_dim);
    const kvs::AttentionTask task{d.device_memory(y, bytes, "y"),
                                  d.device_memory(q, bytes, "q"),
                                  d.alibi_slopes.empty() ? nullptr : d.alibi_slopes.data(),
                                  window,
                                  d.kv_view(layer),
                                  d.rope_table(),
                                  &d.running_step,
                                  &d.config,
                                  d.pool.thread_count()};
    return enqueue(d.compute, [&d, task] {
      d.pool.run(d.kernels.attention_items(task), [&](uint32_t item, kvs::Scratch& scratch) {
        d.kernels.attention(task, item, scratch);
      });
    });
  });
}

kvs_status kvs_silu_mul(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_rows(d, row_count);
    require(size > 0, "silu_mul: size must be positive");
    const kvs::ActivationTask task{d.device_memory(y, f32_bytes(row_count, size), "y"),
                                   d.device_memory(x, f32_bytes(row_count, 2ull * size), "x"), size};
    return enqueue(d.compute, [&d, task, row_count] {
      for_rows(d.pool, row_count, 4ull * task.size, [&](uint32_t row) { d.kernels.silu_mul(task, row); });
    });
  });
}

kvs_status kvs_gelu(kvs_device* device, uint64_t y, uint64_t x, uint32_t row_count, uint32_t size) {
  return guard([&] {
    kvs_device& d = checked(device);
    check_rows(d, row_count);
    require(size > 0, "gelu: size must be positive");
    const kvs::ActivationTask task{d.device_memory(y, f32_bytes(row_count, size), "y"),
                                   d.device_memory(x, f32_bytes(row_count, size), "x"), size};
    return enqueue(d.compute, [&d, task, row_count] {
      for_rows(d.pool, row_count, 4ull * task.size, [&](uint32_t row) { d.kernels.gelu(task, row); });
    });
  });
}

kvs_status kvs_gather_logit_rows(kvs_device* device, uint64_t y, uint64_t x, uint32_t logit_count, uint32_t size) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(size > 0 && logit_count > 0 && logit_count == d.begun_step.logit_count,
            "gather: %u logit rows, but the step that has begun has %u", logit_count, d.begun_step.logit_count);
    float* to = d.device_memory(y, f32_bytes(logit_count, size), "y");
    const float* from = d.device_memory(x, f32_bytes(d.begun_step.row_count, size), "x");
    return enqueue(d.compute, [&d, to, from, logit_count, size] {
      for (uint64_t i = 0; i < logit_count; ++i) {
        const uint64_t row = static_cast<uint64_t>(d.running_step.logit_row[i]);
        std::memcpy(to + i * size, from + row * size, f32_bytes(1, size));
      }
    });
  });
}

kvs_status kvs_sample(kvs_device* device, uint64_t logits, uint64_t results, uint32_t logit_count) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(logit_count > 0 && logit_count == d.begun_step.logit_count,
            "sample: %u logit rows, but the step that has begun has %u", logit_count, d.begun_step.logit_count);
    const float* from = d.device_memory(logits, f32_bytes(logit_count, d.config.vocab_size), "logits");
    char* to = d.host_memory(results, logit_count * sizeof(kvs_sample_result), "results");
    return enqueue(d.compute, [&d, from, to, logit_count] {
      const kvs::SampleTask task{from,
                                 reinterpret_cast<kvs_sample_result*>(to),
                                 reinterpret_cast<int32_t*>(d.tokens.data()),
                                 d.token_stride(),
                                 &d.running_step,
                                 &d.config};
      d.pool.run(logit_count, [&](uint32_t row, kvs::Scratch& scratch) {
        kvs::sample(d.kernels, task, row, scratch);
      });
    });
  });
}

}  // extern "C"
