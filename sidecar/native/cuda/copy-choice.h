// How slices that are no neighbours cross the bus fastest on this machine, found by trying when the host tier opens.

#pragma once

#include "layer-copy.h"

namespace kvs {

struct CopyChoice {
  CopyMethod load = CopyMethod::engine;
  CopyMethod save = CopyMethod::engine;
};

/** Times the copy engine and the kernel on scattered slices of this size (a layer of a block), in scratch memory of its
 * own: ten copies of 16 MiB at most, each way and by either. Where there is no room to try, the copy engine. Throws
 * Failure. */
CopyChoice fastest_copies(uint64_t slice_bytes, cudaStream_t stream);

const char* name_of(CopyMethod method);

}  // namespace kvs
