// io_uring through bare system calls, for bench/disk.ts: DEPTH random reads of BLOCK bytes in flight, O_DIRECT, into
// huge pages, for some seconds. Prints the rate in GB/s, or nothing (and exits 1) where io_uring is refused.
//   disk-uring FILE FILE_BYTES BLOCK DEPTH SECONDS

#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

namespace {

constexpr uint64_t huge_page = 2u << 20;

/** The two rings and what of them is used here. */
struct Ring {
  int descriptor = -1;
  io_uring_params params{};
  char* submissions = nullptr;
  char* completions = nullptr;
  io_uring_sqe* entries = nullptr;

  bool open(unsigned depth) {
    descriptor = static_cast<int>(syscall(SYS_io_uring_setup, depth, &params));
    if (descriptor < 0) return false;
    submissions = map(params.sq_off.array + params.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING);
    completions = map(params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
    entries = reinterpret_cast<io_uring_sqe*>(map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
    return true;
  }

  char* map(uint64_t bytes, uint64_t offset) const {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor,
                        static_cast<off_t>(offset));
    if (memory == MAP_FAILED) std::abort();
    return static_cast<char*>(memory);
  }

  static std::atomic<uint32_t>& word(char* ring, uint32_t offset) {
    return *reinterpret_cast<std::atomic<uint32_t>*>(ring + offset);
  }

  void push(int file, void* memory, uint32_t bytes, uint64_t offset, uint64_t tag) {
    const uint32_t tail = word(submissions, params.sq_off.tail).load();
    const uint32_t index = tail & word(submissions, params.sq_off.ring_mask).load();
    io_uring_sqe& entry = entries[index];
    entry = {};
    entry.opcode = IORING_OP_READ;
    entry.fd = file;
    entry.addr = reinterpret_cast<uint64_t>(memory);
    entry.len = bytes;
    entry.off = offset;
    entry.user_data = tag;
    reinterpret_cast<uint32_t*>(submissions + params.sq_off.array)[index] = index;
    word(submissions, params.sq_off.tail).store(tail + 1, std::memory_order_release);
  }

  void enter(unsigned submit, unsigned wait) const {
    const long done = syscall(SYS_io_uring_enter, descriptor, submit, wait, IORING_ENTER_GETEVENTS, nullptr, 0);
    if (done < 0) std::abort();
  }

  bool pop(io_uring_cqe& completion) {
    const uint32_t head = word(completions, params.cq_off.head).load();
    if (head == word(completions, params.cq_off.tail).load(std::memory_order_acquire)) return false;
    const uint32_t mask = word(completions, params.cq_off.ring_mask).load();
    completion = reinterpret_cast<io_uring_cqe*>(completions + params.cq_off.cqes)[head & mask];
    word(completions, params.cq_off.head).store(head + 1, std::memory_order_release);
    return true;
  }
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return 2;
  const uint64_t file_bytes = std::strtoull(arguments[2], nullptr, 10);
  const uint32_t block = static_cast<uint32_t>(std::strtoul(arguments[3], nullptr, 10));
  const unsigned depth = static_cast<unsigned>(std::atoi(arguments[4]));
  const double seconds = std::atof(arguments[5]);
  const int file = open(arguments[1], O_RDONLY | O_DIRECT);
  Ring ring;
  if (file < 0 || !ring.open(depth)) return 1;

  std::mt19937_64 random{std::random_device{}()};
  const uint64_t bytes_at_once = uint64_t{depth} * block;
  void* mapping = mmap(nullptr, bytes_at_once + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return 1;
  char* memory = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(mapping) + huge_page - 1) / huge_page * huge_page);
  madvise(memory, bytes_at_once, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes_at_once);
  const auto push = [&](uint64_t tag) {
    ring.push(file, memory + tag * block, block, random() % (file_bytes / block) * block, tag);
  };
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (uint64_t tag = 0; tag < depth; ++tag) push(tag);
  uint64_t bytes = 0;
  unsigned pushed = depth;
  double elapsed = 0;
  while (elapsed < seconds) {
    ring.enter(pushed, 1);
    pushed = 0;
    io_uring_cqe completion{};
    while (ring.pop(completion)) {
      if (completion.res != static_cast<int32_t>(block)) return 3;
      bytes += block;
      push(completion.user_data);
      ++pushed;
    }
    elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  }
  std::printf("%.4f\n", static_cast<double>(bytes) / elapsed / 1e9);
}
