// What this machine can do at most, for bench/cpu.ts: multiply-adds in registers, and reading memory, on some threads
// at once. Built by the bench for the processor at hand. Prints JSON:
//   cpu-hardware THREADS MIB... -> {"gflops": n, "readGBps": {"MIB": n, ...}}

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
constexpr int chains = 20;
#elif defined(__AVX__)
constexpr int lanes = 8;
constexpr int chains = 12;
#else
constexpr int lanes = 4;
constexpr int chains = 12;
#endif
typedef float Vec __attribute__((vector_size(lanes * 4)));

constexpr int rounds = 40;  // short ones: some find the machine to themselves
std::atomic<float> sink;

using Clock = std::chrono::steady_clock;

/** From the first thread's start to the last one's end. */
double seconds_of(const std::function<void(int)>& work, int threads) {
  std::barrier start(threads);
  std::vector<Clock::time_point> begins(static_cast<size_t>(threads)), ends(static_cast<size_t>(threads));
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back([&, i] {
      start.arrive_and_wait();
      begins[static_cast<size_t>(i)] = Clock::now();
      work(i);
      ends[static_cast<size_t>(i)] = Clock::now();
    });
  }
  for (std::thread& worker : workers) worker.join();
  const auto begin = *std::min_element(begins.begin(), begins.end());
  const auto end = *std::max_element(ends.begin(), ends.end());
  return std::chrono::duration<double>(end - begin).count();
}

/** Best of some rounds: others on the machine only ever slow it down. */
double best_rate(double amount, int threads, const std::function<void(int)>& work) {
  double best = 0.0;
  for (int i = 0; i < rounds; ++i) best = std::max(best, amount / seconds_of(work, threads));
  return best;
}

double peak_gflops(int threads) {
  const long steps = 400'000;
  const auto work = [&](int) {
    Vec sums[chains] = {};
    Vec a = {}, b = {};
    for (int lane = 0; lane < lanes; ++lane) a[lane] = 0.999f, b[lane] = 0.001f;
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 32
      for (int c = 0; c < chains; ++c) {
        sums[c] = sums[c] * a + b;
        asm volatile("" : "+x"(sums[c]));
      }
    }
    Vec total = {};
#pragma GCC unroll 32
    for (int c = 0; c < chains; ++c) total += sums[c];
    sink = total[0];
  };
  return best_rate(2e-9 * lanes * chains * static_cast<double>(steps) * threads, threads, work);
}

double read_gbps(const char* memory, uint64_t bytes, int threads) {
  const uint64_t part = bytes / static_cast<uint64_t>(threads) / 4096 * 4096;
  const int passes = static_cast<int>(std::max<uint64_t>(1, (64ull << 20) / part));
  const auto work = [&](int index) {
    const char* mine = memory + part * static_cast<uint64_t>(index);
    Vec sums[4] = {};
    for (int pass = 0; pass < passes; ++pass) {
      for (uint64_t at = 0; at < part; at += 4 * sizeof(Vec)) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] += *reinterpret_cast<const Vec*>(mine + at + k * sizeof(Vec));
      }
    }
    sink = ((sums[0] + sums[1]) + (sums[2] + sums[3]))[0];
  };
  return best_rate(1e-9 * static_cast<double>(part) * passes * threads, threads, work);
}

char* huge_pages(uint64_t bytes) {
  const uint64_t page = 2ull << 20;
  void* mapping = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  char* memory = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(mapping) + page - 1) / page * page);
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  for (uint64_t at = 0; at < bytes; at += 4096) memory[at] = 1;
  return memory;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return 1;
  const int threads = std::atoi(arguments[1]);
  std::printf("{\"gflops\": %.1f, \"readGBps\": {", peak_gflops(threads));
  uint64_t most = 0;
  for (int i = 2; i < count; ++i) most = std::max<uint64_t>(most, std::strtoull(arguments[i], nullptr, 10));
  const char* memory = huge_pages(most << 20);
  if (memory == nullptr) return 1;
  for (int i = 2; i < count; ++i) {
    const uint64_t mebibytes = std::strtoull(arguments[i], nullptr, 10);
    std::printf("%s\"%s\": %.1f", i > 2 ? ", " : "", arguments[i], read_gbps(memory, mebibytes << 20, threads));
  }
  std::printf("}}\n");
  return 0;
}
