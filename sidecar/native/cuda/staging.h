// A ring of page-locked memory: bytes that a caller passes by pointer are copied here, and from here to the device in
// stream order, so that the call can return at once.

#pragma once

#include <cstdint>
#include <deque>

#include "device-memory.h"
#include "streams.h"

namespace kvs {

class Staging {
 public:
  explicit Staging(uint64_t bytes) : ring_(bytes) {}

  /** Copies source to device memory behind what the stream holds. Waits only when the ring is full. */
  void copy_to_device(void* destination, const void* source, uint64_t bytes, cudaStream_t stream);

  /** Largest piece that copy() takes. */
  uint64_t piece_bytes() const { return ring_.bytes() / 4; }
  /** One piece in the ring; valid until release() has been reached by its stream. */
  char* take(const void* source, uint64_t bytes);
  /** Pieces taken so far are free once the stream gets here. */
  void release(cudaStream_t stream);

 private:
  struct Lease {
    uint64_t end;  // of the bytes in use, counted since the start
    CudaEvent done;
  };

  void reclaim(uint64_t bytes);

  PinnedMemory ring_;
  uint64_t taken_ = 0;  // bytes since the start, gaps at the ring's end included
  uint64_t freed_ = 0;
  std::deque<Lease> leases_;
  std::deque<CudaEvent> spare_events_;
};

}  // namespace kvs
