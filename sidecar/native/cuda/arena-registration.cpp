// Pieces are whole slots, so that no copy crosses from one registration into another.

#include "arena-registration.h"

#include <sys/mman.h>

#include <algorithm>

#include "cuda-error.h"
#include "numa-preference.h"

namespace kvs {

namespace {

constexpr uint64_t page_bytes = 4096;

/** Makes the pages before the driver does, which holds its lock meanwhile. */
void populate(char* begin, uint64_t bytes) {
#ifdef MADV_POPULATE_WRITE
  if (madvise(begin, bytes, MADV_POPULATE_WRITE) == 0) return;
#endif
  // Adopted slots hold data: pages are touched without changing it.
  for (uint64_t at = 0; at < bytes; at += page_bytes) __atomic_fetch_or(begin + at, 0, __ATOMIC_RELAXED);
}

}  // namespace

ArenaRegistration::ArenaRegistration(char* slots, uint64_t slot_bytes, uint32_t slot_count, const Gpu& gpu,
                                     std::shared_ptr<WakeSignal> wake)
    : slots_(slots),
      slot_bytes_(slot_bytes),
      slot_count_(slot_count),
      gpu_index_(gpu.index),
      numa_node_(gpu.numa_node),
      wake_(std::move(wake)) {
  thread_ = std::thread([this] { run(); });
}

ArenaRegistration::~ArenaRegistration() {
  is_closing_.store(true);
  thread_.join();
  for (char* piece : pieces_) {
    if (cudaHostUnregister(piece) != cudaSuccess) cudaGetLastError();
  }
}

void ArenaRegistration::throw_if_failed() const {
  if (has_failed_.load(std::memory_order_acquire)) fail(KVS_OUT_OF_MEMORY, "%s", failure_.c_str());
}

void ArenaRegistration::run() {
  cudaSetDevice(gpu_index_);
  const NumaPreference preference(numa_node_);
  const uint32_t slots_per_piece = arena_piece_slots(slot_bytes_);
  for (uint32_t first = 0; first < slot_count_ && !is_closing_.load(); first += slots_per_piece) {
    const uint32_t count = std::min(slots_per_piece, slot_count_ - first);
    char* begin = slots_ + first * slot_bytes_;
    const uint64_t bytes = count * slot_bytes_;
    populate(begin, bytes);
    const cudaError_t error = cudaHostRegister(begin, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess) {
      cudaGetLastError();
      failure_ = "host memory for the cache cannot be page-locked (" + std::string(cudaGetErrorString(error)) +
                 "): make the host tier smaller or raise ulimit -l";
      has_failed_.store(true, std::memory_order_release);
      wake_->post();
      return;
    }
    pieces_.push_back(begin);
    ready_slots_.store(first + count, std::memory_order_release);
    wake_->post();
  }
}

}  // namespace kvs
