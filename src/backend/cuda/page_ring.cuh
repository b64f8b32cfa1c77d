// PageRing: a warp's walk over head pages of global memory, their pieces copied to shared memory a few ahead.
// Device code; all lanes of the one warp that owns it call together.
#pragma once

#include "backend/cuda/packed_layout.h"
#include "backend/cuda/warp_ops.cuh"

namespace vericache::cuda {

// Pages first, first + step, ... below last. Of each, all pieces of K come, then all of V.
struct PageWalk {
  std::byte* const* pages = nullptr;
  int first = 0;
  int last = 0;
  int step = 1;
  Pieces keys{};
  Pieces values{};
};

template <int kStages, int kStageBytes>
class PageRing {
 public:
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarrierBytes = kStages * 8;

  // memory (kBytes), barriers (kBarrierBytes): the warp's own. Begins to copy.
  __device__ PageRing(std::byte* memory, std::byte* barriers, const PageWalk& walk)
      : memory_(memory),
        barriers_(shared_address(barriers)),
        walk_(walk),
        count_(walk.first < walk.last ? (walk.last - walk.first + walk.step - 1) / walk.step : 0),
        lane_(static_cast<int>(threadIdx.x) % 32) {
#ifdef VERICACHE_COPY_ENGINE
    if (lane_ == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(barriers_ + stage * 8);
      }
      barriers_ready();
    }
    __syncwarp();
#endif
    find_page();
    for (int stage = 0; stage < kStages; ++stage) {
      copy_next(stage);
    }
  }

  // The oldest piece, when it is there.
  __device__ const std::byte* wait() {
#ifdef VERICACHE_COPY_ENGINE
    barrier_wait(barriers_ + stage_ * 8, parity_);
#else
    copies_wait<kStages - 1>();
    __syncwarp();
#endif
    return memory_ + stage_ * kStageBytes;
  }
  // The oldest piece has been read: its place takes the next copy.
  __device__ void release() {
    __syncwarp();
    copy_next(stage_);
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  // Page addresses are read for 32 pages at once: a lane keeps one.
  __device__ void find_page() {
    if (copied_ >= count_) {
      return;
    }
    if (copied_ % 32 == 0) {
      const int mine = min(copied_ + lane_, count_ - 1);
      addresses_ = reinterpret_cast<uint64_t>(walk_.pages[walk_.first + mine * walk_.step]);
    }
    source_ = reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, addresses_, copied_ % 32));
  }

  __device__ void copy_next(int stage) {
    if (copied_ < count_) {
      const bool of_keys = piece_ < walk_.keys.count;
      const bool first = piece_ == 0 || piece_ == walk_.keys.count;
      const int groups = of_keys ? walk_.keys.group_bytes : walk_.values.group_bytes;
      const int bytes = (of_keys ? walk_.keys.bytes : walk_.values.bytes) + (first ? groups : 0);
      copy(stage, bytes);
      source_ += bytes;
      if (++piece_ == walk_.keys.count + walk_.values.count) {
        piece_ = 0;
        ++copied_;
        find_page();
      }
    }
#ifndef VERICACHE_COPY_ENGINE
    copies_commit();  // even when there is nothing to copy: wait() counts groups
#endif
  }

  __device__ void copy(int stage, int bytes) {
    const uint32_t target = shared_address(memory_) + stage * kStageBytes;
#ifdef VERICACHE_COPY_ENGINE
    if (lane_ == 0) {
      copy_start(target, source_, bytes, barriers_ + stage * 8);
    }
#else
    for (int i = lane_ * 16; i < bytes; i += 512) {
      copy_lane(target + i, source_ + i);
    }
#endif
  }

  std::byte* memory_;
  uint32_t barriers_;
  PageWalk walk_;
  int count_;  // pages of this warp
  int lane_;
  int copied_ = 0;  // pages whose copies have all begun
  int piece_ = 0;   // of the page whose copies are under way
  uint64_t addresses_ = 0;
  const std::byte* source_ = nullptr;  // of the next piece
  int stage_ = 0;                      // of the oldest piece
  uint32_t parity_ = 0;
};

}  // namespace vericache::cuda
