// Positions count bytes since the start; a piece never wraps, the gap before the ring's end belongs to it.

#include "staging.h"

#include <algorithm>
#include <cstring>

#include "host-read.h"

namespace kvs {

void Staging::copy_to_device(void* destination, const void* source, uint64_t bytes, cudaStream_t stream) {
  char* to = static_cast<char*>(destination);
  const char* from = static_cast<const char*>(source);
  while (bytes != 0) {
    const uint64_t size = std::min(bytes, piece_bytes());
    const char* piece = take(from, size);
    if (size <= host_read_bytes_max && (size | reinterpret_cast<uint64_t>(to)) % sizeof(int32_t) == 0) {
      read_host(to, piece, size, stream);
    } else {
      check_cuda(cudaMemcpyAsync(to, piece, size, cudaMemcpyHostToDevice, stream), "copy to the device");
    }
    release(stream);
    to += size;
    from += size;
    bytes -= size;
  }
}

char* Staging::take(const void* source, uint64_t bytes) {
  constexpr uint64_t alignment = 256;
  const uint64_t size = (bytes + alignment - 1) / alignment * alignment;
  const uint64_t capacity = ring_.bytes();
  const uint64_t at = taken_ % capacity;
  const uint64_t gap = at + size > capacity ? capacity - at : 0;
  reclaim(gap + size);
  taken_ += gap + size;
  char* piece = ring_.as<char>() + (taken_ - size) % capacity;
  std::memcpy(piece, source, bytes);
  return piece;
}

void Staging::release(cudaStream_t stream) {
  CudaEvent event = spare_events_.empty() ? CudaEvent() : std::move(spare_events_.front());
  if (!spare_events_.empty()) spare_events_.pop_front();
  event.record(stream);
  leases_.push_back({taken_, std::move(event)});
}

/** Makes room for so many bytes, waiting for the oldest leases if need be. */
void Staging::reclaim(uint64_t bytes) {
  while (taken_ + bytes - freed_ > ring_.bytes()) {
    Lease& oldest = leases_.front();
    oldest.done.wait();
    freed_ = oldest.end;
    spare_events_.push_back(std::move(oldest.done));
    leases_.pop_front();
  }
}

}  // namespace kvs
