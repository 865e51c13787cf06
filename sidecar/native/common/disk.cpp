// The disk tier's file: preallocated, locked, O_DIRECT where the file system can. Requests go into a bounded queue,
// I/O threads do pread or pwrite and the checksum, completions are reaped by the engine. Every accepted request holds
// a place in the completion ring from the start, so a completion always has room.

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../kvasir.h"
#include "failure.h"
#include "wake-signal.h"

namespace {

constexpr uint32_t queue_capacity = 1024;
constexpr uint32_t threads_max = 64;
constexpr uint64_t alignment_bytes = 4096;

using Clock = std::chrono::steady_clock;

kvs_status status_of_errno(int error) {
  return error == ENOSPC || error == EDQUOT || error == EFBIG ? KVS_NO_SPACE : KVS_IO;
}

/** Whole transfer or an error number; a short read at the file's end is EIO. */
int transfer(int descriptor, char* memory, uint64_t bytes, uint64_t offset, uint32_t operation) {
  while (bytes != 0) {
    const ssize_t done = operation == KVS_DISK_READ
                             ? pread(descriptor, memory, bytes, static_cast<off_t>(offset))
                             : pwrite(descriptor, memory, bytes, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return EIO;
    memory += done;
    offset += static_cast<uint64_t>(done);
    bytes -= static_cast<uint64_t>(done);
  }
  return 0;
}

int sync_file(int descriptor) {
#ifdef __linux__
  return fdatasync(descriptor) == 0 ? 0 : errno;
#else
  return fsync(descriptor) == 0 ? 0 : errno;
#endif
}

}  // namespace

/** What the I/O threads share with the handle; outlives the handle when a request hangs. */
struct DiskState {
  int direct = -1;   // for requests; O_DIRECT where possible
  int buffered = -1; // for read_now and write_now, any alignment
  uint64_t file_bytes = 0;
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable idle;
  std::deque<kvs_disk_request> reads;
  std::deque<kvs_disk_request> writes;  // and syncs
  std::deque<kvs_disk_completion> completions;
  uint32_t in_flight = 0;       // accepted, not yet reaped
  uint32_t running = 0;         // in the hands of a thread
  uint32_t writes_running = 0;  // of these, writes and syncs
  uint32_t writes_running_max = 1;
  std::atomic<bool> is_closing = false;
  std::shared_ptr<kvs::WakeSignal> wake;

  bool is_at_rest() {
    std::lock_guard lock(mutex);
    return in_flight == 0;
  }

  bool is_idle() const { return reads.empty() && writes.empty() && running == 0; }

  ~DiskState() {
    if (direct >= 0) close(direct);
    if (buffered >= 0) close(buffered);
  }
};

struct kvs_disk {
  std::shared_ptr<DiskState> state;
  std::vector<std::thread> threads;
};

namespace {

using kvs::fail;
using kvs::guard;
using kvs::require;

kvs_disk_completion perform(const DiskState& state, const kvs_disk_request& request) {
  const Clock::time_point begin = Clock::now();
  char* memory = reinterpret_cast<char*>(request.address);
  kvs_disk_completion completion{};
  completion.tag = request.tag;
  // Before the write: the checksum must be of the bytes that were handed over.
  if (request.operation == KVS_DISK_WRITE) completion.checksum = kvs_checksum(memory, request.bytes);
  const int error = request.operation == KVS_DISK_SYNC
                        ? sync_file(state.buffered)
                        : transfer(state.direct, memory, request.bytes, request.offset_bytes, request.operation);
  completion.status = error == 0 ? KVS_OK : status_of_errno(error);
  // After a close that didn't wait for this read its memory may be gone.
  if (request.operation == KVS_DISK_READ && error == 0 && !state.is_closing) {
    completion.checksum = kvs_checksum(memory, request.bytes);
  }
  const auto elapsed = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin);
  completion.elapsed_us = static_cast<uint32_t>(elapsed.count());
  return completion;
}

/** Someone waits for a read; writes are background work, and never take every thread. */
bool take_request(DiskState& state, kvs_disk_request& request) {
  if (state.reads.empty() && (state.writes.empty() || state.writes_running == state.writes_running_max)) return false;
  std::deque<kvs_disk_request>& queue = state.reads.empty() ? state.writes : state.reads;
  request = queue.front();
  queue.pop_front();
  ++state.running;
  if (request.operation != KVS_DISK_READ) ++state.writes_running;
  return true;
}

void io_thread(const std::shared_ptr<DiskState>& state) {
  std::unique_lock lock(state->mutex);
  for (;;) {
    kvs_disk_request request{};
    bool is_taken = false;
    state->work.wait(lock, [&] { return (is_taken = take_request(*state, request)) || state->is_closing; });
    if (!is_taken) return;
    lock.unlock();
    const kvs_disk_completion completion = perform(*state, request);
    lock.lock();
    --state->running;
    if (request.operation != KVS_DISK_READ) --state->writes_running;
    state->completions.push_back(completion);
    if (state->wake) state->wake->post();
    if (state->is_idle()) state->idle.notify_all();
  }
}

/** Reserves the file's blocks; an error number where the file system can't or has no room. */
int preallocate(int descriptor, uint64_t bytes) {
#ifdef __linux__
  int error;
  do {
    error = fallocate(descriptor, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  return error;
#else
  (void)descriptor, (void)bytes;
  return EOPNOTSUPP;
#endif
}

/** Gives the file its size, keeping what fits; true when its blocks are reserved. On failure it is as it was. */
bool size_file(const DiskState& state, const char* path, uint64_t old_bytes) {
  const int error = preallocate(state.buffered, state.file_bytes);
  if (status_of_errno(error) == KVS_NO_SPACE) {
    // What was reserved before room ran out would stay reserved; the error that counts is the first.
    if (ftruncate(state.buffered, static_cast<off_t>(old_bytes)) != 0) errno = error;
    fail(KVS_NO_SPACE, "no room for %llu bytes at %s: %s", static_cast<unsigned long long>(state.file_bytes), path,
         std::strerror(error));
  }
  if (ftruncate(state.buffered, static_cast<off_t>(state.file_bytes)) != 0) {
    fail(status_of_errno(errno), "cannot size %s: %s", path, std::strerror(errno));
  }
  return error == 0;
}

void open_file(DiskState& state, const char* path, kvs_disk_info& info) {
  state.buffered = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
  if (state.buffered < 0 && errno == ELOOP) fail(KVS_IO, "cannot open %s: it is a symbolic link", path);
  if (state.buffered < 0) fail(status_of_errno(errno), "cannot open %s: %s", path, std::strerror(errno));
  struct stat status{};
  if (fstat(state.buffered, &status) != 0) fail(KVS_IO, "cannot stat %s: %s", path, std::strerror(errno));
  require(S_ISREG(status.st_mode), "%s is not a regular file", path);
  if (flock(state.buffered, LOCK_EX | LOCK_NB) != 0) {
    fail(errno == EWOULDBLOCK ? KVS_IN_USE : KVS_IO, "cannot lock %s: %s", path,
         errno == EWOULDBLOCK ? "another process uses it" : std::strerror(errno));
  }
  // It holds conversations.
  if (fchmod(state.buffered, 0600) != 0) fail(KVS_IO, "cannot make %s private: %s", path, std::strerror(errno));
  info.is_new = status.st_size == 0 ? 1 : 0;
  info.is_preallocated = size_file(state, path, static_cast<uint64_t>(status.st_size)) ? 1 : 0;
}

bool is_same_file(int one, int other) {
  struct stat a{}, b{};
  return fstat(one, &a) == 0 && fstat(other, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/** Some file systems accept O_DIRECT at open and refuse it at the first read, so one is made. */
bool reads_direct(int descriptor) {
  std::unique_ptr<void, decltype(&std::free)> probe(std::aligned_alloc(alignment_bytes, alignment_bytes), &std::free);
  return probe && pread(descriptor, probe.get(), alignment_bytes, 0) >= 0;
}

/** A second descriptor, for requests. Its path could be another file by now: that is never touched. */
void open_direct(DiskState& state, const char* path, kvs_disk_info& info) {
#ifdef O_DIRECT
  state.direct = open(path, O_RDWR | O_DIRECT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  info.is_direct = state.direct >= 0 && is_same_file(state.direct, state.buffered) && reads_direct(state.direct);
  if (info.is_direct != 0) return;
  if (state.direct >= 0) close(state.direct);
#endif
  state.direct = dup(state.buffered);
  if (state.direct < 0) fail(KVS_IO, "cannot open %s: %s", path, std::strerror(errno));
}

void check_request(const DiskState& state, const kvs_disk_request& request) {
  require(request.operation <= KVS_DISK_SYNC, "disk operation %u is unknown", request.operation);
  if (request.operation == KVS_DISK_SYNC) return;
  require(request.bytes != 0 && request.bytes % alignment_bytes == 0, "%u bytes is not a multiple of 4096",
          request.bytes);
  require(request.address != 0 && request.address % alignment_bytes == 0, "memory is not 4096-byte aligned");
  require(request.offset_bytes % alignment_bytes == 0 && request.offset_bytes <= state.file_bytes &&
              request.bytes <= state.file_bytes - request.offset_bytes,
          "%u bytes at %llu lie outside the file or are not aligned", request.bytes,
          static_cast<unsigned long long>(request.offset_bytes));
}

void transfer_now(kvs_disk* disk, uint64_t offset, void* memory, uint64_t bytes, uint32_t operation) {
  require(disk != nullptr && memory != nullptr, "disk and memory must not be null");
  const DiskState& state = *disk->state;
  require(offset <= state.file_bytes && bytes <= state.file_bytes - offset, "the range lies outside the file");
  int error = transfer(state.buffered, static_cast<char*>(memory), bytes, offset, operation);
  if (error == 0 && operation == KVS_DISK_WRITE) error = sync_file(state.buffered);
  if (error != 0) fail(status_of_errno(error), "disk transfer failed: %s", std::strerror(error));
}

}  // namespace

extern "C" {

kvs_status kvs_disk_open(const char* path, uint64_t file_bytes, uint32_t thread_count, kvs_disk** out,
                         kvs_disk_info* info) {
  return guard([&] {
    require(path != nullptr && out != nullptr && info != nullptr, "path, out and info must not be null");
    require(file_bytes != 0 && file_bytes % alignment_bytes == 0 && file_bytes < (1ull << 62),
            "the file's size must be a positive multiple of 4096");
    require(thread_count >= 1 && thread_count <= threads_max, "%u I/O threads: 1 to %u", thread_count, threads_max);
    auto disk = std::make_unique<kvs_disk>();
    disk->state = std::make_shared<DiskState>();
    disk->state->file_bytes = file_bytes;
    kvs_disk_info opened{};
    open_file(*disk->state, path, opened);
    open_direct(*disk->state, path, opened);
    opened.thread_count = thread_count;
    disk->state->writes_running_max = (thread_count + 1) / 2;
    for (uint32_t i = 0; i < thread_count; ++i) {
      disk->threads.emplace_back([state = disk->state] { io_thread(state); });
    }
    *info = opened;
    *out = disk.release();
  });
}

kvs_status kvs_disk_submit(kvs_disk* disk, const kvs_disk_request* requests, uint32_t count, uint32_t* accepted) {
  return guard([&] {
    require(disk != nullptr && requests != nullptr && accepted != nullptr, "submit: null argument");
    DiskState& state = *disk->state;
    *accepted = 0;
    for (uint32_t i = 0; i < count; ++i) check_request(state, requests[i]);
    uint32_t taken;
    {
      std::lock_guard lock(state.mutex);
      taken = std::min(count, queue_capacity - state.in_flight);
      for (uint32_t i = 0; i < taken; ++i) {
        (requests[i].operation == KVS_DISK_READ ? state.reads : state.writes).push_back(requests[i]);
      }
      state.in_flight += taken;
    }
    if (taken == 1) state.work.notify_one();
    if (taken > 1) state.work.notify_all();
    *accepted = taken;
    if (taken == count) return KVS_OK;
    kvs::set_last_error("the disk queue is full");
    return KVS_BUSY;
  });
}

kvs_status kvs_disk_reap(kvs_disk* disk, kvs_disk_completion* completions, uint32_t capacity, uint32_t* count) {
  return guard([&] {
    require(disk != nullptr && completions != nullptr && count != nullptr, "reap: null argument");
    DiskState& state = *disk->state;
    std::lock_guard lock(state.mutex);
    uint32_t taken = 0;
    for (; taken < capacity && !state.completions.empty(); ++taken) {
      completions[taken] = state.completions.front();
      state.completions.pop_front();
    }
    state.in_flight -= taken;
    *count = taken;
  });
}

kvs_status kvs_disk_wake(kvs_disk* disk, kvs_device* device) {
  return guard([&] {
    require(disk != nullptr, "disk must not be null");
    std::shared_ptr<kvs::WakeSignal> wake = device == nullptr ? nullptr : kvs::wake_signal_of(device);
    std::lock_guard lock(disk->state->mutex);
    disk->state->wake = std::move(wake);
    if (disk->state->wake && !disk->state->completions.empty()) disk->state->wake->post();
  });
}

kvs_status kvs_disk_read_now(kvs_disk* disk, uint64_t offset_bytes, void* destination, uint64_t bytes) {
  return guard([&] { transfer_now(disk, offset_bytes, destination, bytes, KVS_DISK_READ); });
}

kvs_status kvs_disk_write_now(kvs_disk* disk, uint64_t offset_bytes, const void* source, uint64_t bytes) {
  return guard([&] { transfer_now(disk, offset_bytes, const_cast<void*>(source), bytes, KVS_DISK_WRITE); });
}

kvs_status kvs_disk_discard(kvs_disk* disk) {
  return guard([&] {
    require(disk != nullptr, "disk must not be null");
    const DiskState& state = *disk->state;
    require(disk->state->is_at_rest(), "the disk cannot be emptied while requests are in flight");
    if (ftruncate(state.buffered, 0) != 0) fail(KVS_IO, "cannot empty the disk file: %s", std::strerror(errno));
    size_file(state, "the disk file", 0);
  });
}

kvs_status kvs_disk_close(kvs_disk* disk, uint32_t timeout_us) {
  return guard([&] {
    require(disk != nullptr, "disk must not be null");
    std::unique_ptr<kvs_disk> owned(disk);
    DiskState& state = *owned->state;
    bool is_idle;
    {
      std::unique_lock lock(state.mutex);
      is_idle = state.idle.wait_for(lock, std::chrono::microseconds(timeout_us),
                                    [&] { return state.is_idle(); });
      state.reads.clear();
      state.writes.clear();
      state.wake.reset();
      state.is_closing = true;
    }
    state.work.notify_all();
    // A thread stuck in the kernel can't be joined: it keeps the state alive and ends on its own.
    for (std::thread& thread : owned->threads) is_idle ? thread.join() : thread.detach();
    if (!is_idle) fail(KVS_IO, "disk requests were still in flight after %u us", timeout_us);
  });
}

}  // extern "C"
