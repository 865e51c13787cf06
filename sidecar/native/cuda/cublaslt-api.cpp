// Where cuBLASLt may lie: as the loader finds it, in the toolkit, or where KVASIR_CUBLASLT says.

#include "cublaslt-api.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "../common/failure.h"

namespace kvs::cublaslt {

namespace {

std::vector<std::string> candidates() {
  const char* named = std::getenv("KVASIR_CUBLASLT");
  if (named != nullptr && *named != '\0') return {named};
  std::vector<std::string> paths;
  for (const char* folder : {"", "/usr/local/cuda/lib64/", "/opt/cuda/lib64/"}) {
    for (const char* file : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
      paths.push_back(std::string(folder) + file);
    }
  }
  return paths;
}

void* open_library() {
  for (const std::string& path : candidates()) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  }
  fail(KVS_UNSUPPORTED,
       "cannot load libcublasLt.so.13 or .12: install the CUDA toolkit, or name the file in KVASIR_CUBLASLT");
}

template <class Function>
void find(void* library, Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) fail(KVS_UNSUPPORTED, "this libcublasLt has no %s: version 12 or newer is needed", name);
}

Api load() {
  void* library = open_library();
  Api api{};
  find(library, api.get_version, "cublasLtGetVersion");
  find(library, api.create, "cublasLtCreate");
  find(library, api.destroy, "cublasLtDestroy");
  find(library, api.desc_create, "cublasLtMatmulDescCreate");
  find(library, api.desc_destroy, "cublasLtMatmulDescDestroy");
  find(library, api.desc_set, "cublasLtMatmulDescSetAttribute");
  find(library, api.layout_create, "cublasLtMatrixLayoutCreate");
  find(library, api.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(library, api.preference_create, "cublasLtMatmulPreferenceCreate");
  find(library, api.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(library, api.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(library, api.get_heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(library, api.check, "cublasLtMatmulAlgoCheck");
  find(library, api.matmul, "cublasLtMatmul");
  return api;
}

}  // namespace

const Api& api() {
  static const Api loaded = load();
  return loaded;
}

}  // namespace kvs::cublaslt
