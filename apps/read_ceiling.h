// The read bandwidth that this machine reaches with its threads: what decoding is held against.
// Called from the thread that drives the kernels.
#pragma once

#include "backend/kernels.h"

namespace vericache {

// GB/s of reading `bytes` bytes again and again, the best of several times. What of them a cache can keep it keeps, as
// in decoding.
double read_ceiling_gbps(Kernels& kernels, int threads, size_t bytes);

}  // namespace vericache
