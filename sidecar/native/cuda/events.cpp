// Events and waiting: kvs_event_*, kvs_record, kvs_stream_wait, kvs_wait, kvs_post.

#include "events.h"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>

#include "device.h"

namespace kvs {

uint32_t Events::create() {
  events_.emplace_back();
  return static_cast<uint32_t>(events_.size() - 1);
}

void Events::record(uint32_t event, cudaStream_t stream, uint32_t stream_index, bool is_watched) {
  Event& entry = events_[event];
  entry.cuda.record(stream);
  ++entry.recordings;
  if (is_watched) watched_[stream_index].push_back({event, entry.recordings});
}

void Events::wait_on(cudaStream_t stream, uint32_t event) const {
  check_cuda(cudaStreamWaitEvent(stream, events_[event].cuda, 0), "cudaStreamWaitEvent");
}

bool Events::has_watched() const {
  return std::any_of(watched_.begin(), watched_.end(), [](const auto& queue) { return !queue.empty(); });
}

bool Events::is_over(const Watched& watched) const {
  const Event& event = events_[watched.event];
  return event.recordings != watched.recording || event.cuda.is_done();
}

bool Events::reap() {
  bool has_ended = false;
  for (auto& queue : watched_) {
    while (!queue.empty() && is_over(queue.front())) {
      queue.pop_front();
      has_ended = true;
    }
  }
  return has_ended;
}

namespace {

using Clock = std::chrono::steady_clock;

/** Looks without pause at first (a step's end is often near), then every nap_us. */
constexpr auto spin_time = std::chrono::microseconds(30);
constexpr uint32_t nap_us = 20;

/** Timers of this thread are exact: the default would make a nap of 20 us one of 70. */
void set_exact_timers() {
  thread_local const int is_set = prctl(PR_SET_TIMERSLACK, 1000);
  static_cast<void>(is_set);
}

bool wait_for_any(kvs_device& device, uint32_t timeout_us) {
  const Clock::time_point begin = Clock::now();
  const Clock::time_point deadline = begin + std::chrono::microseconds(timeout_us);
  set_exact_timers();
  for (;;) {
    const bool has_ended = device.events.reap();
    if (device.wake->wait(0) || has_ended) return true;
    const Clock::time_point now = Clock::now();
    if (now >= deadline) return false;
    const auto left = std::chrono::duration_cast<std::chrono::microseconds>(deadline - now).count() + 1;
    if (!device.events.has_watched()) return device.wake->wait(static_cast<uint32_t>(left));
    if (now - begin < spin_time) continue;
    if (device.wake->wait(static_cast<uint32_t>(std::min<int64_t>(left, nap_us)))) return true;
  }
}

}  // namespace
}  // namespace kvs

using kvs::require;
using kvs::with_device;

extern "C" {

kvs_status kvs_event_create(kvs_device* device, uint32_t* event) {
  return with_device(device, [&](kvs_device& d) {
    require(event != nullptr, "event must not be null");
    *event = d.events.create();
  });
}

kvs_status kvs_record(kvs_device* device, kvs_stream stream, uint32_t event, uint32_t watch) {
  return with_device(device, [&](kvs_device& d) {
    const cudaStream_t s = d.stream(stream);
    require(d.events.exists(event), "no event %u", event);
    d.require_no_capture("kvs_record");
    d.events.record(event, s, stream, watch != 0);
  });
}

kvs_status kvs_stream_wait(kvs_device* device, kvs_stream stream, uint32_t event) {
  return with_device(device, [&](kvs_device& d) {
    const cudaStream_t s = d.stream(stream);
    require(d.events.exists(event), "no event %u", event);
    d.require_no_capture("kvs_stream_wait");
    d.events.wait_on(s, event);
  });
}

kvs_status kvs_event_query(kvs_device* device, uint32_t event) {
  return with_device(device, [&](kvs_device& d) {
    require(d.events.exists(event), "no event %u", event);
    return d.events.is_done(event) ? KVS_OK : KVS_PENDING;
  });
}

kvs_status kvs_wait(kvs_device* device, uint32_t timeout_us) {
  return with_device(device, [&](kvs_device& d) {
    return kvs::wait_for_any(d, timeout_us) ? KVS_OK : KVS_TIMEOUT;
  });
}

// The one call of other threads: it touches the signal alone.
kvs_status kvs_post(kvs_device* device) {
  return kvs::guard([&] {
    require(device != nullptr, "device must not be null");
    device->wake->post();
  });
}

}  // extern "C"
