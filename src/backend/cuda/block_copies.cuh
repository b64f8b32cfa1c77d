// Copies of a block of threads to its shared memory.
// Device code; all threads of the block call together.
#pragma once

#include "backend/cuda/warp_ops.cuh"

namespace vericache::cuda {

// By the copy engine where there is one, else by all threads; kMost copies, once each.
template <int kThreads>
class BlockCopies {
 public:
  static constexpr int kMost = 3;

  // barriers (kMost): in shared memory. All threads of the block call, here and below.
  __device__ explicit BlockCopies(uint64_t* barriers) : barriers_(shared_address(barriers)) {
#ifdef VERICACHE_COPY_ENGINE
    if (threadIdx.x == 0) {
      for (uint32_t i = 0; i < kMost; ++i) {
        barrier_init(barriers_ + i * 8);
      }
      barriers_ready();
    }
#endif
  }
  // bytes and both addresses: multiples of 16.
  template <int kWhich>
  __device__ void start(std::byte* target, const std::byte* source, uint32_t bytes) {
    const uint32_t to = shared_address(target);
#ifdef VERICACHE_COPY_ENGINE
    started_[kWhich] = bytes > 0;
    if (threadIdx.x == 0 && bytes > 0) {
      copy_start(to, source, bytes, barriers_ + kWhich * 8);
    }
#else
#pragma unroll 1
    for (uint32_t at = threadIdx.x * 16; at < bytes; at += kThreads * 16) {
      copy_lane(to + at, source + at);
    }
#endif
  }
  // They are there, and all that the threads wrote before.
  __device__ void finish() {
#ifdef VERICACHE_COPY_ENGINE
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (started_[i]) {
        barrier_wait(barriers_ + static_cast<uint32_t>(i) * 8, 0);
      }
    }
#else
    copies_commit();
    copies_wait<0>();
    __syncthreads();
#endif
  }

 private:
  uint32_t barriers_;
  bool started_[kMost] = {};
};

}  // namespace vericache::cuda
