// PartRing: the K and V of the pages that a block of exact attention walks, on their way through shared memory.
// Device code of attention.cu alone.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/warp_ops.cuh"
#include "backend/kv_view.h"

namespace vericache::cuda {

// The pages of one KV head that a block walks: of full KV, past pages and then tail pages are the absolute pages.
struct BlockWalk {
  const std::byte* const* past;
  const std::byte* const* tail;
  int past_pages;
  int first;
  int count;
  // Where the address of the index-th page of the walk stands.
  __device__ const std::byte* const* entry(int index) const {
    const int page = first + index;
    return page < past_pages ? past + page : tail + (page - past_pages);
  }
};

// K of the first page, its V, K of the second page, and so on: parts in a ring of shared-memory slots. Every warp of
// the block acquires and releases every part, in order. What only loads need lies in shared memory too: registers are
// for accumulators.
template <int HeadDim, int Warps>
class PartRing {
 public:
  static constexpr int kPartBytes = kPageTokens * HeadDim * 2;
  // Two or three blocks share a multiprocessor: 64 KB each keep more bytes in flight than HBM's latency needs.
  static constexpr int kSlots = 65536 / (2 * kPartBytes) * 2;
  static constexpr int kBytes = kSlots * kPartBytes;

  struct Control {
    uint64_t full[kSlots];
    uint64_t empty[kSlots];
    BlockWalk walk;
    // Addresses of pages: index i of the walk at i % 64. The 32 that are being loaded, and the next 32.
    const std::byte* pages[64];
  };

  // All threads of the block; `slots` is aligned to 128 bytes.
  __device__ PartRing(std::byte* slots, Control* control, const BlockWalk& walk)
      : slots_(slots), control_(control), parts_(2 * walk.count) {
    if (threadIdx.x == 0) {
      control->walk = walk;
#ifdef VERICACHE_COPY_ENGINE
      for (int slot = 0; slot < kSlots; ++slot) {
        barrier_init(shared_address(&control->full[slot]));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&control->empty[slot])), "r"(Warps)
                     : "memory");
      }
      barriers_ready();
#endif
    }
    __syncthreads();
#ifdef VERICACHE_COPY_ENGINE
    if (threadIdx.x < 32) {
      fetch_addresses(0);
      fetch_addresses(32);
      wait_for_addresses();
      if (threadIdx.x == 0) {
        for (int part = 0; part < min(kSlots, parts_); ++part) {
          load(static_cast<unsigned>(part));
        }
      }
    }
#else
    for (unsigned part = 0; part < kSlots - 1; ++part) {
      load(part);
    }
#endif
  }

  // Waits until a part has arrived.
  __device__ __forceinline__ const std::byte* acquire(unsigned part) {
#ifdef VERICACHE_COPY_ENGINE
    barrier_wait(shared_address(&control_->full[part % kSlots]), part / kSlots % 2);
#else
    // One group of copies per part, so that all but the youngest kSlots - 2 are the parts up to this one. Behind the
    // barrier everyone has released the part before it.
    copies_wait<kSlots - 2>();
    __syncthreads();
    load(part - 1 + kSlots);
#endif
    return slots_ + part % kSlots * kPartBytes;
  }

  // The calling warp will not read the part again.
  __device__ __forceinline__ void release(unsigned part) {
#ifdef VERICACHE_COPY_ENGINE
    __syncwarp();
    if (Warps > 1 && threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&control_->empty[part % kSlots]))
                   : "memory");
    }
    // The first warp refills slots: not the one that it has just left, where it might wait for the others.
    const unsigned next = part + kSlots - (Warps > 1 ? 1 : 0);
    if (threadIdx.x < 32 && next >= kSlots && next < static_cast<unsigned>(parts_)) {
      if (next % 64 == 0) {
        wait_for_addresses();
        fetch_addresses(static_cast<int>(next / 2 + 32));
      }
      if (threadIdx.x == 0) {
        if (Warps > 1) {
          barrier_wait(shared_address(&control_->empty[next % kSlots]), (next / kSlots - 1) % 2);
        }
        load(next);
      }
    }
#else
    (void)part;
#endif
  }

 private:
#ifdef VERICACHE_COPY_ENGINE
  // The addresses of 32 pages begin to arrive; the first warp.
  __device__ void fetch_addresses(int index) {
    const int mine = index + static_cast<int>(threadIdx.x);
    if (mine < control_->walk.count) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(&control_->pages[mine % 64])),
                   "l"(control_->walk.entry(mine))
                   : "memory");
    }
  }
  __device__ void wait_for_addresses() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
  }

  // One thread.
  __device__ __forceinline__ void load(unsigned part) {
    const unsigned slot = part % kSlots;
    copy_start(shared_address(slots_ + slot * kPartBytes), control_->pages[part / 2 % 64] + part % 2 * kPartBytes,
               kPartBytes, shared_address(&control_->full[slot]));
  }
#else
  // All threads; behind the last part an empty group.
  __device__ void load(unsigned part) {
    if (part < static_cast<unsigned>(parts_)) {
      const std::byte* source = *control_->walk.entry(static_cast<int>(part / 2)) + part % 2 * kPartBytes;
      const uint32_t target = shared_address(slots_ + part % kSlots * kPartBytes);
      for (unsigned byte = threadIdx.x * 16; byte < kPartBytes; byte += Warps * 32 * 16) {
        copy_lane(target + byte, source + byte);
      }
    }
    copies_commit();
  }
#endif

  std::byte* slots_;
  Control* control_;
  int parts_;
};

}  // namespace vericache::cuda
