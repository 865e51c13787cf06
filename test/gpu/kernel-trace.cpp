// Writes when each kernel began and ended, for programs that know nothing of it: a CUPTI injection library, loaded by
// the driver (CUDA_INJECTION64_PATH). Kernels of captured graphs are listed one by one. A line a kernel: begin ns, end
// ns, grid x, dynamic shared memory, name. kernel-trace.py makes tables of it; run.sh builds and runs both (timeline).

#include <cupti.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

constexpr size_t buffer_bytes = 8 << 20;
constexpr uint32_t flush_period_ms = 200;

FILE* out = nullptr;
std::mutex out_mutex;

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* records_max) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, buffer_bytes));
  *bytes = *buffer == nullptr ? 0 : buffer_bytes;
  *records_max = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  const std::lock_guard<std::mutex> lock(out_mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto* kernel = reinterpret_cast<const KERNEL_RECORD*>(record);  // the newest that cupti_activity.h has
    std::fprintf(out, "%llu %llu %d %d %s\n", static_cast<unsigned long long>(kernel->start),
                 static_cast<unsigned long long>(kernel->end), kernel->gridX, kernel->dynamicSharedMemory,
                 kernel->name);
  }
  std::fflush(out);
  std::free(buffer);
}

void check(CUptiResult result, const char* what) {
  if (result != CUPTI_SUCCESS) std::fprintf(stderr, "kernel-trace: %s: CUPTI error %d\n", what, result);
}

}  // namespace

extern "C" int InitializeInjection() {
  const char* path = std::getenv("KERNEL_TRACE");
  out = path == nullptr ? nullptr : std::fopen(path, "w");
  if (out == nullptr) {
    std::fprintf(stderr, "kernel-trace: KERNEL_TRACE must name a file to write\n");
    return 0;
  }
  check(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "callbacks");
  check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels");
  check(cuptiActivityFlushPeriod(flush_period_ms), "flushes");  // a program may leave without going through exit()
  return 1;
}
