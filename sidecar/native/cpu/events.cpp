// One mutex for all: events are recorded a few times a step, not per element.

#include "events.h"

#include <algorithm>

namespace kvs {

uint32_t Events::create() {
  std::lock_guard lock(mutex_);
  events_.emplace_back();
  return static_cast<uint32_t>(events_.size() - 1);
}

bool Events::exists(uint32_t event) {
  std::lock_guard lock(mutex_);
  return event < events_.size();
}

uint64_t Events::begin(uint32_t event) {
  std::lock_guard lock(mutex_);
  return ++events_[event].recorded;
}

void Events::finish(uint32_t event, uint64_t ticket, kvs_status status) {
  {
    std::lock_guard lock(mutex_);
    Event& entry = events_[event];
    if (ticket > entry.finished) {
      entry.finished = ticket;
      entry.status = status;
    }
  }
  finished_.notify_all();
}

uint64_t Events::latest(uint32_t event) {
  std::lock_guard lock(mutex_);
  return events_[event].recorded;
}

kvs_status Events::wait(uint32_t event, uint64_t ticket) {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return events_[event].finished >= ticket; });
  return events_[event].status;
}

kvs_status Events::query(uint32_t event) {
  std::lock_guard lock(mutex_);
  const Event& entry = events_[event];
  return entry.finished < entry.recorded ? KVS_PENDING : entry.status;
}

}  // namespace kvs
