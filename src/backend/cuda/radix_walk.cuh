// RadixWalk: finds where, in the order of integer keys, a given mass has been gathered. Masses are integers, so the
// place does not depend on who adds what when, nor on the number of blocks. Device code; every thread of a cluster
// calls it.
#pragma once

#include "backend/cuda/cluster.cuh"

namespace vericache::cuda {

class RadixWalk {
 public:
  static constexpr int kBins = 256;

  struct Bin {
    int index;
    uint64_t before;  // mass of the bins below
    uint64_t mass;
  };
  // 64-bit sums of two words each: shared memory adds words natively, wider numbers in a loop.
  struct Histogram {
    uint32_t low[kBins];
    uint32_t high[kBins];
  };
  struct Shared {
    Histogram histograms[2];  // in turn: the one is cleared while neighbours still read the other
    uint64_t warp_mass[kBins / 32];
    Bin found;
  };
  struct Place {
    uint32_t key;
    uint64_t needed;  // of the mass at this key
    uint64_t mass;    // at this key
  };

  // Blocks have kBins threads or more.
  __device__ RadixWalk(const Cluster& cluster, Shared& shared) : cluster_(cluster), shared_(shared) {
    clear(0);
    clear(1);
    __syncthreads();
  }

  __device__ void add(int bin, uint64_t mass) {
    // Equal neighbours meet here rather than in shared memory.
    if (bin != pending_bin_) {
      flush();
      pending_bin_ = bin;
    }
    pending_ += mass;
  }

  // Sums what all threads added since the last time; returns the total.
  __device__ uint64_t gather() {
    flush();
    cluster_.sync();
    clear(turn_ ^ 1);
    const int bin = static_cast<int>(threadIdx.x);
    mass_ = 0;
    before_ = 0;
    if (bin < kBins) {
      for (int rank = 0; rank < cluster_.size(); ++rank) {
        const Histogram& part = cluster_.of(rank, shared_.histograms[turn_]);
        mass_ += (uint64_t{part.high[bin]} << 32) + part.low[bin];
      }
      before_ = mass_;
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t below = __shfl_up_sync(~0u, before_, static_cast<unsigned>(step));
        before_ += bin % 32 >= step ? below : 0;
      }
      if (bin % 32 == 31) {
        shared_.warp_mass[bin / 32] = before_;
      }
      before_ -= mass_;
    }
    __syncthreads();
    uint64_t total = 0;
    for (int warp = 0; warp < kBins / 32; ++warp) {
      before_ += warp < bin / 32 ? shared_.warp_mass[warp] : 0;
      total += shared_.warp_mass[warp];
    }
    turn_ ^= 1;
    return total;
  }

  // The bin of what was gathered last in which the mass reaches `needed`, which is from 1 to the total.
  __device__ Bin find(uint64_t needed) {
    if (threadIdx.x < kBins && before_ < needed && needed <= before_ + mass_) {
      shared_.found = {static_cast<int>(threadIdx.x), before_, mass_};
    }
    __syncthreads();
    return shared_.found;
  }

  // The key at which, in rising order, the mass reaches `needed`. each(visit) calls visit(key, mass) for this thread's
  // share, where mass() computes the mass of that one element.
  template <typename Each>
  __device__ Place find_key(uint64_t needed, const Each& each) {
    Place place{0, needed, 0};
    for (int shift = 24; shift >= 0; shift -= 8) {
      each([&](uint32_t key, const auto& mass) {
        if (uint64_t{key} >> (shift + 8) == place.key) {
          add(static_cast<int>(key >> shift & 255), mass());
        }
      });
      gather();
      const Bin bin = find(place.needed);
      place = {place.key << 8 | static_cast<uint32_t>(bin.index), place.needed - bin.before, bin.mass};
    }
    return place;
  }

 private:
  __device__ void clear(int turn) {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      shared_.histograms[turn].low[i] = 0;
      shared_.histograms[turn].high[i] = 0;
    }
  }

  __device__ void flush() {
    if (pending_ == 0) {
      return;
    }
    Histogram& histogram = shared_.histograms[turn_];
    const auto low = static_cast<uint32_t>(pending_);
    auto high = static_cast<uint32_t>(pending_ >> 32);
    if (low != 0 && atomicAdd(&histogram.low[pending_bin_], low) > ~low) {
      ++high;  // the carry
    }
    if (high != 0) {
      atomicAdd(&histogram.high[pending_bin_], high);
    }
    pending_ = 0;
  }

  const Cluster& cluster_;
  Shared& shared_;
  int turn_ = 0;
  int pending_bin_ = 0;
  uint64_t pending_ = 0;
  uint64_t mass_ = 0;    // of this thread's bin
  uint64_t before_ = 0;  // of the bins below it
};

}  // namespace vericache::cuda
