// The read bandwidth that this machine reaches with its threads: what decoding is held against.
// Called from the thread that drives the kernels.
#pragma once

#include "backend/kernels.h"

namespace vericache {

// GB/s of summing 512 MB that no cache holds, the best of five times.
double read_ceiling_gbps(Kernels& kernels, int threads);

}  // namespace vericache
