// Page-locks the host arena piece by piece in the background, so that a start need not wait for it: slots are usable
// as soon as their piece is registered.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../common/wake-signal.h"
#include "gpu.h"

namespace kvs {

/** Slots that are page-locked together: no copy may reach from one such piece into the next. */
inline uint32_t arena_piece_slots(uint64_t slot_bytes) {
  const uint64_t slots = (1ull << 30) / slot_bytes;
  return slots == 0 ? 1 : static_cast<uint32_t>(slots);
}

class ArenaRegistration {
 public:
  /** Each registered piece wakes `wake`: copies that met KVS_BUSY may be tried again. */
  ArenaRegistration(char* slots, uint64_t slot_bytes, uint32_t slot_count, const Gpu& gpu,
                    std::shared_ptr<WakeSignal> wake);
  /** Ends the thread and unlocks what it locked. No copy may be in flight. */
  ~ArenaRegistration();
  ArenaRegistration(const ArenaRegistration&) = delete;
  ArenaRegistration& operator=(const ArenaRegistration&) = delete;

  /** Slots [0, this) can be copied from and to. */
  uint32_t ready_slots() const { return ready_slots_.load(std::memory_order_acquire); }
  /** Throws Failure when the system refused to lock a piece. */
  void throw_if_failed() const;

 private:
  void run();

  char* const slots_;
  const uint64_t slot_bytes_;
  const uint32_t slot_count_;
  const int gpu_index_;
  const int numa_node_;
  const std::shared_ptr<WakeSignal> wake_;
  std::vector<char*> pieces_;  // of the thread, until it has ended
  std::string failure_;        // written before has_failed_
  std::atomic<bool> has_failed_{false};
  std::atomic<uint32_t> ready_slots_{0};
  std::atomic<bool> is_closing_{false};
  std::thread thread_;
};

}  // namespace kvs
