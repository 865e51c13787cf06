// kvs_read_ahead: the system reads while the program works on what it has. Large files of weights come at the speed of
// the disk then; without it reads wait for one small request after the other.

#include <fcntl.h>

#include <algorithm>

#include "../kvasir.h"

namespace {

constexpr uint64_t request_bytes = 128 << 10;

}  // namespace

extern "C" void kvs_read_ahead(int32_t file, uint64_t offset_bytes, uint64_t bytes) {
#if defined(__APPLE__)
  radvisory range{};
  range.ra_offset = static_cast<off_t>(offset_bytes);
  range.ra_count = static_cast<int>(std::min<uint64_t>(bytes, 1u << 30));
  fcntl(file, F_RDADVISE, &range);
#else
  // Of each advice Linux takes no more than the device's largest request or its read-ahead, whichever is larger.
  for (uint64_t done = 0; done < bytes; done += request_bytes) {
    const uint64_t now = std::min(request_bytes, bytes - done);
    posix_fadvise(file, static_cast<off_t>(offset_bytes + done), static_cast<off_t>(now), POSIX_FADV_WILLNEED);
  }
#endif
}
