// /proc and the cgroup files where there are any, sysconf elsewhere.

#include "system-info.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace kvs {

namespace {

/** The number in `path`, or `otherwise` when there is none ("max", no such file). */
uint64_t number_in(const char* path, uint64_t otherwise) {
  std::ifstream file(path);
  uint64_t value;
  return file >> value ? value : otherwise;
}

uint64_t meminfo_bytes(const std::string& key, uint64_t otherwise) {
  std::ifstream file("/proc/meminfo");
  for (std::string word; file >> word;) {
    uint64_t kibibytes;
    if (word == key && file >> kibibytes) return kibibytes * 1024;
  }
  return otherwise;
}

}  // namespace

MemoryInfo memory_info() {
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t machine = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * page;
  const uint64_t available = meminfo_bytes("MemAvailable:", machine / 2);
  const uint64_t unlimited = ~0ull;
  const uint64_t limit = std::min(number_in("/sys/fs/cgroup/memory.max", unlimited),
                                  number_in("/sys/fs/cgroup/memory/memory.limit_in_bytes", unlimited));
  if (limit >= machine) return {std::min(available, machine), machine};
  const uint64_t used = std::min(number_in("/sys/fs/cgroup/memory.current", limit),
                                 number_in("/sys/fs/cgroup/memory/memory.usage_in_bytes", limit));
  return {std::min(available, limit - used), limit};
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t at = line.find(": ");
    if (at == std::string::npos) break;
    std::string name = line.substr(at + 2);
    std::erase_if(name, [](char c) { return c == '"' || c == '\\' || static_cast<unsigned char>(c) < 32; });
    return name;
  }
  return "unknown processor";
}

}  // namespace kvs
