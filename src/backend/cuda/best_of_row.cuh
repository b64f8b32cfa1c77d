// The best of a row of scores, as BestArgs says: one cluster of blocks a row, each block a slice of it. A radix walk
// finds the score of the last one kept, then every block writes its own in their order. Device code; every thread of a
// cluster of blocks of kThreads calls.
#pragma once

#include "backend/cuda/cluster.cuh"
#include "backend/cuda/radix_walk.cuh"

namespace vericache::cuda {

template <int kThreads>
struct BestShared {
  RadixWalk::Shared walk;
  uint32_t better;  // of this block's slice
  uint32_t equal;
  uint32_t warps[2][kThreads / 32];
};

// The best of a row are those whose key is below `key`, and those at it but for the first `skipped`.
struct Threshold {
  uint32_t key = ~0u;
  uint32_t skipped = 0;
};

__device__ inline uint32_t key_of(float score) {
  return rank_key(score > -INFINITY ? score : -INFINITY);
}

__device__ inline Threshold find_threshold(const Cluster& cluster, const RowSlice& slice, int count,
                                           RadixWalk::Shared& shared) {
  RadixWalk walk(cluster, shared);
  const RadixWalk::Place place = walk.find_key(static_cast<uint64_t>(count), [&](const auto& visit) {
    each_value(slice, [&](int, float score) { visit(key_of(score), [] { return uint64_t{1}; }); });
  });
  return {place.key, static_cast<uint32_t>(place.mass - place.needed)};
}

// Low half: values better than the threshold, high half: values at it. At most 4 each of a thread, 4096 of a block.
__device__ inline uint32_t kinds(const uint32_t (&keys)[4], int valid, uint32_t threshold) {
  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < valid) {
      count += keys[i] < threshold ? 1u : keys[i] == threshold ? 1u << 16 : 0u;
    }
  }
  return count;
}

// The sum over the threads before this one, and over all threads in `total`. Every other call uses the other `warps`.
template <int kWarps>
__device__ uint32_t scan(uint32_t own, uint32_t (&warps)[kWarps], uint32_t& total) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t through = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0u, through, static_cast<unsigned>(step));
    through += lane >= step ? below : 0;
  }
  if (lane == 31) {
    warps[warp] = through;
  }
  __syncthreads();
  uint32_t before = through - own;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    before += i < warp ? warps[i] : 0;
    total += warps[i];
  }
  return before;
}

__device__ inline void load_keys(const RowSlice& slice, int quad, uint32_t (&keys)[4]) {
  const uint4 bits = slice.load(quad);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keys[i] = key_of(__uint_as_float(words[i]));
  }
}
// How many of a quad's four values are of the slice.
__device__ inline int valid_of(const RowSlice& slice, int quad) {
  return quad < slice.end ? min(4, slice.count - quad * 4) : 0;
}

// How many values of the lower ranks' slices are better than the threshold and at it.
template <int kThreads>
__device__ void count_before(const Cluster& cluster, const RowSlice& slice, const Threshold& threshold,
                             BestShared<kThreads>& shared, uint32_t& better, uint32_t& equal) {
  uint32_t own_better = 0;
  uint32_t own_equal = 0;
  each_value(slice, [&](int, float score) {
    const uint32_t key = key_of(score);
    own_better += key < threshold.key ? 1 : 0;
    own_equal += key == threshold.key ? 1 : 0;
  });
  if (threadIdx.x == 0) {
    shared.better = 0;
    shared.equal = 0;
  }
  __syncthreads();
  own_better = __reduce_add_sync(~0u, own_better);
  own_equal = __reduce_add_sync(~0u, own_equal);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&shared.better, own_better);
    atomicAdd(&shared.equal, own_equal);
  }
  cluster.sync();
  better = 0;
  equal = 0;
  for (int rank = 0; rank < cluster.rank(); ++rank) {
    better += cluster.of(rank, shared.better);
    equal += cluster.of(rank, shared.equal);
  }
}

// put(place, index) of each that is chosen, places in the order of indices, those of lower ranks first.
template <int kThreads, typename Put>
__device__ void write_chosen(const RowSlice& slice, const Threshold& threshold, uint32_t better, uint32_t equal,
                             BestShared<kThreads>& shared, const Put& put) {
  int turn = 0;
  for (int first = slice.begin; first < slice.end; first += kThreads) {
    const int quad = first + static_cast<int>(threadIdx.x);
    const int valid = valid_of(slice, quad);
    uint32_t keys[4];
    load_keys(slice, quad, keys);
    uint32_t total;
    const uint32_t before = scan(kinds(keys, valid, threshold.key), shared.warps[turn], total);
    uint32_t better_before = better + (before & 0xffff);
    uint32_t equal_before = equal + (before >> 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_better = i < valid && keys[i] < threshold.key;
      const bool is_equal = i < valid && keys[i] == threshold.key;
      if (is_better || (is_equal && equal_before >= threshold.skipped)) {
        const uint32_t kept_equal = equal_before > threshold.skipped ? equal_before - threshold.skipped : 0;
        put(better_before + kept_equal, quad * 4 + i);
      }
      better_before += is_better ? 1 : 0;
      equal_before += is_equal ? 1 : 0;
    }
    better += total & 0xffff;
    equal += total >> 16;
    turn ^= 1;
  }
}

}  // namespace vericache::cuda
