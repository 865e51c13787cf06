// Events: pending when recorded, done or failed when their stream gets there. Each recording has a ticket, so a
// stream that waits for an event waits for the recording it saw.

#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>

#include "../kvasir.h"

namespace kvs {

class Events {
 public:
  uint32_t create();
  bool exists(uint32_t event);
  /** The event is pending from now; the ticket names this recording. */
  uint64_t begin(uint32_t event);
  /** By the stream: the recording `ticket` is over. */
  void finish(uint32_t event, uint64_t ticket, kvs_status status);
  /** The event's latest recording, for wait(). */
  uint64_t latest(uint32_t event);
  /** Blocks until that recording is over; its status. */
  kvs_status wait(uint32_t event, uint64_t ticket);
  /** KVS_OK, KVS_PENDING or the failure. */
  kvs_status query(uint32_t event);

 private:
  struct Event {
    uint64_t recorded = 0;
    uint64_t finished = 0;
    kvs_status status = KVS_OK;
  };

  std::mutex mutex_;
  std::condition_variable finished_;
  std::deque<Event> events_;
};

}  // namespace kvs
