// kvs_read_ahead: the system reads while the program works on what it has. Large files of weights come at the speed of
// the disk then; without it reads wait for one small request after the other.

#include <fcntl.h>

#include <algorithm>

#include "../kvasir.h"

extern "C" void kvs_read_ahead(int32_t file, uint64_t offset_bytes, uint64_t bytes) {
#if defined(__APPLE__)
  radvisory range{};
  range.ra_offset = static_cast<off_t>(offset_bytes);
  range.ra_count = static_cast<int>(std::min<uint64_t>(bytes, 1u << 30));
  fcntl(file, F_RDADVISE, &range);
#else
  posix_fadvise(file, static_cast<off_t>(offset_bytes), static_cast<off_t>(bytes), POSIX_FADV_WILLNEED);
#endif
}
