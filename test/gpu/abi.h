// A compute library, loaded by its C ABI: the checks here know nothing else of it.

#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../../sidecar/native/kvasir.h"

namespace check {

#define KVS_FUNCTIONS(X)                                                                                             \
  X(abi_version)                                                                                                     \
  X(last_error) X(open) X(close) X(device_info) X(memory_info) X(set_rope) X(set_alibi) X(alloc) X(free)             \
      X(alloc_host) X(free_host) X(weight_create) X(weight_upload) X(weight_fill_random) X(weight_free)              \
          X(event_create) X(record) X(stream_wait) X(event_query) X(wait) X(post) X(write_tokens) X(begin_step)      \
              X(embed) X(rms_norm) X(layer_norm) X(matmul) X(append_kv) X(attention) X(silu_mul) X(gelu)             \
                  X(gather_logit_rows) X(sample) X(copy_out) X(copy_in) X(graph_begin) X(graph_end) X(graph_launch)  \
                      X(kv_create) X(block_bytes) X(copy_blocks) X(load_layer) X(save_layer) X(host_arena_open)      \
                          X(host_arena_close) X(disk_open) X(disk_submit) X(disk_reap) X(disk_wake) X(disk_read_now) \
                              X(disk_write_now) X(disk_close) X(checksum)

struct Library {
  explicit Library(const char* path) : name(path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(std::string("cannot load ") + path + ": " + dlerror());
#define FIND(function)                                                                     \
  function = reinterpret_cast<decltype(&kvs_##function)>(dlsym(handle, "kvs_" #function)); \
  if (function == nullptr) throw std::runtime_error(std::string(path) + " lacks kvs_" #function);
    KVS_FUNCTIONS(FIND)
#undef FIND
    if (abi_version() != KVS_ABI_VERSION) throw std::runtime_error(std::string(path) + " has another ABI version");
  }

  /** Throws what the library says unless status is KVS_OK. */
  void ok(kvs_status status) const {
    if (status != KVS_OK) throw std::runtime_error(name + ": " + std::to_string(status) + ": " + last_error());
  }

  std::string name;
#define MEMBER(function) decltype(&kvs_##function) function = nullptr;
  KVS_FUNCTIONS(MEMBER)
#undef MEMBER
};

}  // namespace check
