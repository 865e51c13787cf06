// A stream: one thread that runs the operations of a bounded queue in order. Once an operation fails, the rest are
// skipped and the events recorded behind it fail: their data can't be trusted.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../kvasir.h"

namespace kvs {

class Stream {
 public:
  /** `spin_us`: how long an idle stream looks for work before it sleeps; the next call then wakes nobody. */
  Stream(const char* name, uint32_t capacity, uint32_t spin_us);
  /** Runs what is queued, then joins. */
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /** False when fewer than `count` places are free. Only the thread that pushes may ask. */
  bool has_room(uint32_t count = 1) const {
    return queued_.load(std::memory_order_acquire) + count <= operations_.size();
  }
  /** The queue must have room. Operations that must run whatever failed before (events) say so. */
  void push(std::function<void()> operation, bool runs_after_failure = false);
  /** Blocks until everything pushed so far has run. */
  void drain();

  /** KVS_OK, or why this stream is lost. For operations of this stream, on its own thread. */
  kvs_status status() const { return status_; }
  void set_status(kvs_status status) { status_ = status; }

 private:
  struct Operation {
    std::function<void()> run;
    bool runs_after_failure = false;
  };

  void loop(const char* name);
  void wait_for_work();
  void run(Operation& operation) noexcept;

  std::vector<Operation> operations_;  // ring
  uint64_t pushed_ = 0;                // by the caller's thread
  uint64_t popped_ = 0;                // by the stream's thread
  std::atomic<uint32_t> queued_{0};    // pushed and not yet finished
  const uint32_t spin_us_;
  kvs_status status_ = KVS_OK;
  std::atomic<bool> is_asleep_{false};
  std::atomic<bool> is_closing_{false};
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable idle_;
  std::thread thread_;
};

}  // namespace kvs
