// Items are taken by compare-and-swap on one word; workers spin for a moment, so that they are still awake for the next
// operation of a step, then sleep on a futex (std::atomic::wait).

#include "thread-pool.h"

#include <pthread.h>

#include <bit>

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

bool ThreadPool::has_items() const {
  const Ticket ticket = std::bit_cast<Ticket>(ticket_.load(std::memory_order_acquire));
  return ticket.next < ticket.count;
}

void ThreadPool::take_items(Scratch& scratch) {
  uint64_t word = ticket_.load(std::memory_order_acquire);
  for (;;) {
    Ticket ticket = std::bit_cast<Ticket>(word);
    if (ticket.next >= ticket.count) return;
    const uint32_t item = static_cast<uint32_t>(ticket.next++);
    if (!ticket_.compare_exchange_weak(word, std::bit_cast<uint64_t>(ticket), std::memory_order_acq_rel)) continue;
    // This item is ours and not done: the operation can't end, nor its fields change.
    const uint32_t count = count_;
    call_(context_, item, scratch);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) done_.notify_one();
    word = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadPool::run_shared(uint32_t count, Call call, void* context) {
  call_ = call;
  context_ = context;
  count_ = count;
  done_.store(0, std::memory_order_relaxed);
  Ticket ticket = std::bit_cast<Ticket>(ticket_.load(std::memory_order_relaxed));
  ticket.operation = ticket.operation + 1;
  ticket.count = count;
  ticket.next = 0;
  ticket_.store(std::bit_cast<uint64_t>(ticket), std::memory_order_release);
  generation_.fetch_add(1);
  generation_.notify_all();
  take_items(*scratches_[0]);
  if (spin_until([&] { return done_.load(std::memory_order_acquire) == count; }, spin_us)) return;
  for (uint32_t done = done_.load(); done != count; done = done_.load()) done_.wait(done);
}

void ThreadPool::worker(uint32_t index) {
  pthread_setname_np(pthread_self(), "kvs-compute");
  for (;;) {
    const uint32_t seen = generation_.load();
    if (is_closing_.load()) return;
    if (spin_until([this] { return has_items(); }, spin_us)) {
      take_items(*scratches_[index]);
    } else {
      generation_.wait(seen);
    }
  }
}

}  // namespace kvs
