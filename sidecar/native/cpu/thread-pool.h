// Splits one operation over the compute threads. The calling thread (the compute stream's) takes its share; items are
// taken from a common counter, so a core that others disturb simply takes fewer. Which thread computes an item never
// changes its bits.

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
    if (count <= 1 || scratches_.size() == 1) {
      for (uint32_t item = 0; item < count; ++item) call(&body, item, *scratches_[0]);
    } else {
      run_shared(count, call, &body);
    }
  }

 private:
  using Call = void (*)(void* context, uint32_t item, Scratch& scratch);

  void run_shared(uint32_t count, Call call, void* context);
  void take_items(Scratch& scratch);
  void worker(uint32_t index);

  std::vector<std::unique_ptr<Scratch>> scratches_;
  std::vector<std::thread> threads_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  uint32_t count_ = 0;
  alignas(64) std::atomic<uint32_t> next_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};  // a new operation is there
  alignas(64) std::atomic<uint32_t> working_{0};     // workers not yet through with it
  std::atomic<bool> is_closing_{false};
};

}  // namespace kvs
