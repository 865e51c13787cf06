// What kvs_wait sleeps on. Signals are counted, so one that comes between two waits is not lost.
// Held by shared_ptr: the device, its streams and disks that report to it may end in any order.

#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "../kvasir.h"

namespace kvs {

class WakeSignal {
 public:
  void post() {
    {
      std::lock_guard lock(mutex_);
      ++posted_;
    }
    condition_.notify_one();
  }

  /** False on time-out. */
  bool wait(uint32_t timeout_us) {
    std::unique_lock lock(mutex_);
    const bool woken =
        condition_.wait_for(lock, std::chrono::microseconds(timeout_us), [&] { return posted_ != seen_; });
    seen_ = posted_;
    return woken;
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  uint64_t posted_ = 0;
  uint64_t seen_ = 0;
};

/** Each library says where its devices keep theirs. */
std::shared_ptr<WakeSignal> wake_signal_of(kvs_device* device);

}  // namespace kvs
