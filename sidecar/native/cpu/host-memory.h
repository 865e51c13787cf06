// Page-aligned, zeroed memory; large pieces ask for huge pages.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

namespace kvs {

class HostMemory {
 public:
  HostMemory() = default;
  explicit HostMemory(uint64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    const uint64_t huge_bytes = 2ull << 20;
    // Whole huge pages, so that the kernel can use them from the first byte to the last.
    mapped_bytes_ = bytes < huge_bytes ? (bytes + 4095) / 4096 * 4096
                                       : (bytes + 2 * huge_bytes - 1) / huge_bytes * huge_bytes;
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      throw std::bad_alloc();
    }
    data_ = static_cast<char*>(mapping_);
    if (bytes < huge_bytes) return;
    data_ = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(mapping_) + huge_bytes - 1) / huge_bytes * huge_bytes);
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~HostMemory() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  }
  HostMemory(HostMemory&& other) noexcept { swap(other); }
  HostMemory& operator=(HostMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  void swap(HostMemory& other) {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* mapping_ = nullptr;
  uint64_t mapped_bytes_ = 0;
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace kvs
