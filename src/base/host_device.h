// VERICACHE_BOTH: marks functions that host and device code share.
// Any thread, and any kernel.
#pragma once

#ifdef __CUDACC__
#define VERICACHE_BOTH __host__ __device__
#else
#define VERICACHE_BOTH
#endif
