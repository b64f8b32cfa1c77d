// How blocks whose checksums differ are told to the host.
// Device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vericache::cuda {

// Of 64 bits, in every lane. All lanes of a warp.
__device__ inline uint64_t sum_of_lanes(uint64_t sum) {
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
  }
  return sum;
}

// Called once for each of `blocks` blocks, by one thread: the last one adds how many differ to *mismatches, memory of
// the host. A GPU has no atomics there. counters: two words, zero before and behind.
__device__ inline void count_mismatch(bool differs, unsigned int blocks, uint32_t* mismatches, uint32_t* counters) {
  if (differs) {
    atomicAdd(&counters[0], 1u);
  }
  __threadfence();
  if (atomicAdd(&counters[1], 1u) + 1 == blocks) {
    __threadfence();
    const uint32_t count = atomicExch(&counters[0], 0u);
    counters[1] = 0;
    if (count > 0) {
      auto* host = static_cast<volatile uint32_t*>(mismatches);
      *host = *host + count;
      __threadfence_system();
    }
  }
}

}  // namespace vericache::cuda
