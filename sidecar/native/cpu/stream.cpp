// A single-producer ring: only the engine's thread pushes, only the stream's thread pops. The mutex serves sleep alone.

#include "stream.h"

#include <pthread.h>

#include <chrono>
#include <utility>

#include "../common/failure.h"
#include "spin.h"

namespace kvs {

Stream::Stream(const char* name, uint32_t capacity, uint32_t spin_us) : operations_(capacity), spin_us_(spin_us) {
  thread_ = std::thread([this, name] { loop(name); });
}

Stream::~Stream() {
  {
    std::lock_guard lock(mutex_);
    is_closing_.store(true);
  }
  work_.notify_all();
  thread_.join();
}

void Stream::push(std::function<void()> operation, bool runs_after_failure) {
  operations_[pushed_ % operations_.size()] = {std::move(operation), runs_after_failure};
  ++pushed_;
  // seq_cst pairs with wait_for_work: either it sees the operation, or we see that it sleeps.
  queued_.fetch_add(1);
  if (is_asleep_.load()) {
    std::lock_guard lock(mutex_);
    work_.notify_one();
  }
}

void Stream::drain() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [&] { return queued_.load() == 0; });
}

void Stream::wait_for_work() {
  const auto has_work = [this] { return queued_.load() != 0 || is_closing_.load(); };
  if (spin_until(has_work, spin_us_)) return;
  std::unique_lock lock(mutex_);
  is_asleep_.store(true);
  work_.wait(lock, has_work);
  is_asleep_.store(false);
}

void Stream::run(Operation& operation) noexcept {
  if (status_ == KVS_OK || operation.runs_after_failure) {
    const kvs_status status = guard([&] { operation.run(); });
    if (status != KVS_OK && status_ == KVS_OK) status_ = status;
  }
  operation.run = nullptr;
}

void Stream::loop(const char* name) {
  pthread_setname_np(pthread_self(), name);
  for (;;) {
    wait_for_work();
    while (queued_.load(std::memory_order_acquire) != 0) {
      run(operations_[popped_ % operations_.size()]);
      ++popped_;
      if (queued_.fetch_sub(1) == 1) {
        std::lock_guard lock(mutex_);
        idle_.notify_all();
      }
    }
    if (is_closing_.load()) return;
  }
}

}  // namespace kvs
