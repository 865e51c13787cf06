// The events of a device, and which of them wake kvs_wait.
//
// A watched event is found done by the waiting thread itself, which asks the driver: host functions on a stream would
// hold up what comes behind them, and a thread that sleeps in the driver wakes no sooner than one that looks every 20
// us. A busy engine thus pays nothing at all, an idle one a query now and then.

#pragma once

#include <array>
#include <cstdint>
#include <deque>

#include "streams.h"

namespace kvs {

class Events {
 public:
  uint32_t create();
  bool exists(uint32_t event) const { return event < events_.size(); }
  void record(uint32_t event, cudaStream_t stream, uint32_t stream_index, bool is_watched);
  void wait_on(cudaStream_t stream, uint32_t event) const;
  /** False while pending; done when never recorded. Throws what the event waited for. */
  bool is_done(uint32_t event) const { return events_[event].cuda.is_done(); }

  bool has_watched() const;
  /** Watched recordings of this stream that are not known to be over. */
  uint32_t watched_count(uint32_t stream_index) const { return static_cast<uint32_t>(watched_[stream_index].size()); }
  /** Forgets watched recordings that are over; true when there was one. Throws what they waited for. */
  bool reap();

 private:
  struct Event {
    CudaEvent cuda;
    uint64_t recordings = 0;
  };
  struct Watched {
    uint32_t event;
    uint64_t recording;
  };

  /** A later recording of the same event stands for the earlier. */
  bool is_over(const Watched& watched) const;

  std::deque<Event> events_;
  std::array<std::deque<Watched>, 3> watched_;  // per stream, in order
};

}  // namespace kvs
