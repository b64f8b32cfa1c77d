// The memory bandwidth that this machine reaches: what decoding is held against.
// Called from the thread that drives the kernels.
#pragma once

#include "backend/factory.h"

namespace vericache {

// GB/s, the best of several times. On a CPU: of reading `bytes` bytes with its threads again and again; what of them a
// cache can keep it keeps, as in decoding. On a GPU: of copying within its memory, bytes read and written.
double read_ceiling_gbps(DeviceKind kind, Kernels& kernels, int threads, size_t bytes);

}  // namespace vericache
