// Splits one operation over the compute threads. The calling thread (the compute stream's) takes its share; items are
// taken one by one, so a core that others disturb simply takes fewer, and a thread that has not woken up yet is not
// waited for. Which thread computes an item never changes its bits.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "scratch.h"

namespace kvs {

class ThreadPool {
 public:
  /** thread_count includes the caller. */
  ThreadPool(uint32_t thread_count, uint64_t scratch_bytes);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  uint32_t thread_count() const { return static_cast<uint32_t>(scratches_.size()); }

  /** body(item, scratch) for each item of [0, count), on all threads; returns when all are done. It must not throw. */
  template <class Body>
  void run(uint32_t count, Body&& body) {
    const auto call = [](void* context, uint32_t item, Scratch& scratch) {
      scratch.reset();
      (*static_cast<std::remove_reference_t<Body>*>(context))(item, scratch);
    };
    if (count <= 1 || scratches_.size() == 1 || count > count_max) {
      for (uint32_t item = 0; item < count; ++item) call(&body, item, *scratches_[0]);
    } else {
      run_shared(count, call, &body);
    }
  }

 private:
  using Call = void (*)(void* context, uint32_t item, Scratch& scratch);

  /** An operation's number, its items and the next one to take, in one word: whoever takes an item knows it is live. */
  struct Ticket {
    uint64_t operation : 22;
    uint64_t count : 21;
    uint64_t next : 21;
  };
  static constexpr uint32_t count_max = (1u << 21) - 1;

  void run_shared(uint32_t count, Call call, void* context);
  /** Runs items until none is left to take. */
  void take_items(Scratch& scratch);
  bool has_items() const;
  void worker(uint32_t index);

  std::vector<std::unique_ptr<Scratch>> scratches_;
  std::vector<std::thread> threads_;
  // Of the operation in work; they change only when all its items are done.
  Call call_ = nullptr;
  void* context_ = nullptr;
  uint32_t count_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};        // items
  alignas(64) std::atomic<uint32_t> generation_{0};  // what sleeping workers wait on
  std::atomic<bool> is_closing_{false};
};

}  // namespace kvs
