// Generation counter and futex (std::atomic::wait) after a short spin: between the operations of a step workers are
// still spinning, between steps they sleep.

#include "thread-pool.h"

#include <pthread.h>

#include "spin.h"

namespace kvs {

namespace {
// Operations of a step follow each other within a few microseconds; a spin longer than that only takes a core
// from someone else.
constexpr uint32_t spin_us = 20;
}  // namespace

ThreadPool::ThreadPool(uint32_t thread_count, uint64_t scratch_bytes) {
  for (uint32_t i = 0; i < thread_count; ++i) scratches_.push_back(std::make_unique<Scratch>(scratch_bytes));
  for (uint32_t i = 1; i < thread_count; ++i) threads_.emplace_back([this, i] { worker(i); });
}

ThreadPool::~ThreadPool() {
  is_closing_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::take_items(Scratch& scratch) {
  for (;;) {
    const uint32_t item = next_.fetch_add(1, std::memory_order_relaxed);
    if (item >= count_) return;
    call_(context_, item, scratch);
  }
}

void ThreadPool::run_shared(uint32_t count, Call call, void* context) {
  call_ = call;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  working_.store(static_cast<uint32_t>(threads_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1);
  generation_.notify_all();
  take_items(*scratches_[0]);
  if (spin_until([this] { return working_.load(std::memory_order_acquire) == 0; }, spin_us)) return;
  for (uint32_t left = working_.load(); left != 0; left = working_.load()) working_.wait(left);
}

void ThreadPool::worker(uint32_t index) {
  pthread_setname_np(pthread_self(), "kvs-compute");
  uint32_t seen = 0;
  for (;;) {
    const auto is_new = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(is_new, spin_us)) {
      while (!is_new()) generation_.wait(seen);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (is_closing_.load()) return;
    take_items(*scratches_[index]);
    if (working_.fetch_sub(1) == 1) working_.notify_one();
  }
}

}  // namespace kvs
