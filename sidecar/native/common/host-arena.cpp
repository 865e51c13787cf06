// Layout of the mapping: one page that says what it was made for, the headers, the slots.

#include "host-arena.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "failure.h"
#include "system-info.h"

namespace kvs {

namespace {

constexpr uint64_t page_bytes = 4096;
constexpr uint64_t arena_magic = 0x31414E455241564Bull;  // "KVARENA1"

/** First page: adopted only if all of it is as this process would write it. */
struct ArenaMark {
  uint64_t magic;
  uint64_t slot_count;
  uint64_t slot_bytes;
  uint32_t layers, kv_heads, head_dim, block_tokens, kv_dtype, reserved;
};

ArenaMark mark_of(uint32_t slot_count, uint64_t slot_bytes, const kvs_device_config& config) {
  ArenaMark mark{};
  mark.magic = arena_magic;
  mark.slot_count = slot_count;
  mark.slot_bytes = slot_bytes;
  mark.layers = config.layers;
  mark.kv_heads = config.kv_heads;
  mark.head_dim = config.head_dim;
  mark.block_tokens = config.block_tokens;
  mark.kv_dtype = config.kv_dtype;
  return mark;
}

/**
 * Touching shared memory past its room is SIGBUS, so room is made before the mapping. The system would take page after
 * page before it finds that there are too few, and end some process for it: `missing_bytes` are looked for first.
 */
bool reserve(int descriptor, uint64_t bytes, uint64_t missing_bytes) {
  struct statvfs file_system {};
  if (fstatvfs(descriptor, &file_system) != 0) return false;
  if (missing_bytes / file_system.f_frsize > file_system.f_bavail) return false;
  if (missing_bytes > memory_info().free_bytes) return false;
  int error;
  do {
    error = posix_fallocate(descriptor, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  return error == 0;
}

/** Slots are touched long after the start: what can't be had then would cost some process its life. */
void require_memory(uint64_t bytes) {
  const uint64_t free_bytes = memory_info().free_bytes;
  if (bytes <= free_bytes) return;
  fail(KVS_OUT_OF_MEMORY, "the host arena wants %llu bytes, %llu are free", static_cast<unsigned long long>(bytes),
       static_cast<unsigned long long>(free_bytes));
}

}  // namespace

HostArena::HostArena(const char* name, uint32_t slot_count, uint64_t slot_bytes, const kvs_device_config& config)
    : slot_count_(slot_count),
      slot_bytes_(slot_bytes),
      mapping_bytes_(page_bytes + slot_count * (arena_header_bytes + slot_bytes)) {
  if (name == nullptr || !map_shared(name, config)) {
    require_memory(mapping_bytes_);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapping_ == MAP_FAILED) {
      fail(KVS_OUT_OF_MEMORY, "no %llu bytes for the host arena: %s",
           static_cast<unsigned long long>(mapping_bytes_), std::strerror(errno));
    }
#ifdef MADV_HUGEPAGE
    madvise(mapping_, mapping_bytes_, MADV_HUGEPAGE);
#endif
  }
  headers_ = static_cast<char*>(mapping_) + page_bytes;
  slots_ = headers_ + slot_count * arena_header_bytes;
  const ArenaMark mark = mark_of(slot_count, slot_bytes, config);
  if (is_shared_ && !is_adopted_) std::memset(headers_, 0, slot_count * arena_header_bytes);
  std::memcpy(mapping_, &mark, sizeof mark);
}

/** False: no room, or not ours to use; then nothing of that name is kept open. */
bool HostArena::map_shared(const char* name, const kvs_device_config& config) {
  require(name[0] == '/' && std::strchr(name + 1, '/') == nullptr && std::strlen(name) < 250,
          "shared-memory name must be /name, not '%s'", name);
  const int descriptor = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (descriptor < 0) return false;
  struct stat status{};
  const bool has_lock = flock(descriptor, LOCK_EX | LOCK_NB) == 0;
  const bool is_locked = !has_lock && errno == EWOULDBLOCK;
  // Under the lock: its size is then nobody else's to change.
  const bool is_ours = fstat(descriptor, &status) == 0 && status.st_uid == geteuid();
  if (!is_ours || !has_lock) {
    close(descriptor);
    if (is_ours && is_locked) fail(KVS_IN_USE, "another process uses the host arena %s", name);
    return false;
  }
  fchmod(descriptor, 0600);
  const bool same_size = static_cast<uint64_t>(status.st_size) == mapping_bytes_;
  if (!same_size && ftruncate(descriptor, 0) != 0) {
    close(descriptor);
    return false;
  }
  const uint64_t reserved_bytes = same_size ? 512 * static_cast<uint64_t>(status.st_blocks) : 0;
  void* mapping = MAP_FAILED;
  if (reserve(descriptor, mapping_bytes_, mapping_bytes_ - std::min(mapping_bytes_, reserved_bytes))) {
    mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  }
  if (mapping == MAP_FAILED) {
    shm_unlink(name);
    close(descriptor);
    return false;
  }
  const ArenaMark mark = mark_of(slot_count_, slot_bytes_, config);
  is_adopted_ = same_size && std::memcmp(mapping, &mark, sizeof mark) == 0;
  is_shared_ = true;
  mapping_ = mapping;
  descriptor_ = descriptor;
  name_ = name;
  return true;
}

HostArena::~HostArena() {
  munmap(mapping_, mapping_bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

kvs_host_arena HostArena::describe() const {
  kvs_host_arena arena{};
  arena.slots_address = reinterpret_cast<uint64_t>(slots_);
  arena.headers_address = reinterpret_cast<uint64_t>(headers_);
  arena.is_shared = is_shared_ ? 1 : 0;
  arena.is_adopted = is_adopted_ ? 1 : 0;
  return arena;
}

void HostArena::unlink() {
  if (is_shared_) shm_unlink(name_.c_str());
}

}  // namespace kvs
