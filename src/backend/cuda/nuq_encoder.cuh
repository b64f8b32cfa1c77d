// From a bf16 head page in shared memory to what non-uniform codes are made from: outliers, ranges and levels, the same
// bits as NuqEncoder of the CPU (nuq_codes.h).
// Device code; a block of head_dim threads.
#pragma once

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/page_encoder.cuh"
#include "backend/nuq_codes.h"

namespace vericache::cuda {

// Beside a SharedPage. Of K first, then of V.
template <int kHeadDim>
struct NuqMemory {
  uint32_t apart[kHeadDim][2];   // a bit for each token: outliers
  uint16_t chosen[kHeadDim][2];  // of a dim's values: of a greater rank than the least, and of that one
  RankDigit digit;
  uint8_t levels[kNuqLevels];
  union {
    uint32_t counts[kRankDigit];  // of a digit of the ranks
    PlaceSums places;
  };
};

template <int kHeadDim, bool kKeys>
struct NuqPartEncoder {
  static constexpr int kGroups = kKeys ? kHeadDim : kPageTokens;
  SharedPage<kHeadDim>& page;
  NuqMemory<kHeadDim>& memory;
  int held;  // tokens of the page
  KvPart part;
  int thread = static_cast<int>(threadIdx.x);  // and its dim, where a thread has one

  __device__ uint32_t value(int dim, int token) const {
    return kKeys ? reinterpret_cast<const uint16_t*>(page.keys[dim / 32][token])[dim % 32]
                 : reinterpret_cast<const uint16_t*>(page.values[token / 32][dim])[token % 32];
  }
  // Minimum, or at first the mean, and the inverse of the scale.
  __device__ float2& group(int dim, int token) const { return kKeys ? page.key_codes[dim] : page.value_codes[token]; }
  __device__ bool apart(int dim, int token) const { return (memory.apart[dim][token / 32] >> (token % 32) & 1) != 0; }
  __device__ bool counts(int dim, int token) const { return !apart(dim, token) && is_finite(value(dim, token)); }

  // take(group, its k-th dim or token), in their order: a thread has a group.
  template <typename Begin, typename Take, typename End>
  __device__ void for_groups(const Begin& begin, const Take& take, const End& end) const {
    for (int group = thread; group < kGroups; group += kHeadDim) {
      begin();
      const int most = kKeys ? held : group < held ? kHeadDim : 0;
      for (int i = 0; i < most; ++i) {
        take(kKeys ? group : i, kKeys ? i : group);
      }
      end(group);
    }
  }

  __device__ void fit_means() const {
    float sum;
    int count;
    for_groups(
        [&] {
          sum = 0;
          count = 0;
        },
        [&](int dim, int token) {
          const uint32_t bits = value(dim, token);
          if (is_finite(bits)) {
            sum += __uint_as_float(bits << 16);
            ++count;
          }
        },
        [&](int group) {
          (kKeys ? page.key_codes[group] : page.value_codes[group]).x =
              count > 0 ? sum / static_cast<float>(count) : 0.0f;
        });
  }

  __device__ uint32_t rank(int token) const { return outlier_rank(value(thread, token), group(thread, token).x); }

  // Finds a digit of the least rank of an outlier. high: the digit above it, or none.
  template <bool kHigh>
  __device__ RankDigit find(uint32_t wanted, uint32_t high) const {
    for (int i = thread; i < kRankDigit; i += kHeadDim) {
      memory.counts[i] = 0;
    }
    __syncthreads();
    for (int token = 0; token < held; ++token) {
      const uint32_t of_value = rank(token);
      if (kHigh) {
        atomicAdd(&memory.counts[of_value >> 7], 1u);
      } else if (of_value >> 7 == high) {
        atomicAdd(&memory.counts[of_value & 127u], 1u);
      }
    }
    __syncthreads();
    if (thread == 0) {
      memory.digit = find_digit(memory.counts, kHigh ? 256 : 128, wanted);
    }
    __syncthreads();
    return memory.digit;
  }

  // Slots by rising place: a thread has those of a dim.
  __device__ void choose_outliers(uint32_t* slots) const {
    const int room = outlier_slots(part, kHeadDim);
    const auto wanted = static_cast<uint32_t>(min(room, kHeadDim * held));
    const RankDigit high = find<true>(wanted, 0);
    const RankDigit low = find<false>(high.wanted, high.digit);
    const uint32_t least = high.digit << 7 | low.digit;
    uint32_t greater = 0;
    uint32_t equal = 0;
    for (int token = 0; token < held; ++token) {
      const uint32_t of_value = rank(token);
      greater += of_value > least ? 1 : 0;
      equal += of_value == least ? 1 : 0;
    }
    memory.chosen[thread][0] = static_cast<uint16_t>(greater);
    memory.chosen[thread][1] = static_cast<uint16_t>(equal);
    __syncthreads();
    greater = 0;
    equal = 0;
    for (int dim = 0; dim < thread; ++dim) {
      greater += memory.chosen[dim][0];
      equal += memory.chosen[dim][1];
    }
    uint32_t used = greater + min(equal, low.wanted);
    uint32_t bits[2] = {0, 0};
    for (int token = 0; token < held; ++token) {
      const uint32_t of_value = rank(token);
      if (used < wanted && (of_value > least || (of_value == least && equal++ < low.wanted))) {
        slots[used++] = outlier_place(thread, token) | value(thread, token) << 16;
        bits[token / 32] |= 1u << (token % 32);
      }
    }
    memory.apart[thread][0] = bits[0];
    memory.apart[thread][1] = bits[1];
    for (int i = static_cast<int>(wanted) + thread; i < room; i += kHeadDim) {
      slots[i] = kFreeSlot;
    }
  }

  __device__ void fit_ranges(uint16_t* affine) const {
    Range range;
    for_groups([&] { range = Range(); },
               [&](int dim, int token) {
                 if (counts(dim, token)) {
                   range.add(__uint_as_float(value(dim, token) << 16));
                 }
               },
               [&](int group) {
                 (kKeys ? page.key_codes[group] : page.value_codes[group]) =
                     fit(range, kNuqSteps, affine + group, affine + kGroups + group);
               });
  }

  __device__ float position(int dim, int token) const {
    const float2 own = group(dim, token);
    return nuq_position(value(dim, token), own.x, own.y);
  }

  // The counts of all places become sums of those below. The first warp.
  __device__ void sum_places() const {
    constexpr int kOfLane = (kNuqPlaces + 1 + 31) / 32;
    PlaceSums& sums = memory.places;
    const int first = thread * kOfLane;
    const int last = min(first + kOfLane, kNuqPlaces + 1);
    uint32_t count = 0;
    uint32_t sum = 0;
    for (int i = first; i < last; ++i) {
      count += sums.count[i];
      sum += sums.count[i] * static_cast<uint32_t>(i);
    }
    uint32_t count_below = count;
    uint32_t sum_below = sum;
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      const uint32_t more = __shfl_up_sync(kAllLanes, count_below, apart);
      const uint32_t more_sum = __shfl_up_sync(kAllLanes, sum_below, apart);
      count_below += thread >= apart ? more : 0;
      sum_below += thread >= apart ? more_sum : 0;
    }
    count_below -= count;
    sum_below -= sum;
    for (int i = first; i < last; ++i) {
      const uint32_t here = sums.count[i];
      sums.count[i] = count_below;
      sums.sum[i] = sum_below;
      count_below += here;
      sum_below += here * static_cast<uint32_t>(i);
    }
    __syncwarp();
  }

  // The first warp: a lane has a code.
  __device__ void fit_levels(std::byte* stored) const {
    const int codes = 1 << part.bits;
    uint32_t level = thread < codes ? first_level(part.bits, thread) : 0;
    for (int step = 0; step < kLloydSteps; ++step) {
      const uint32_t next = __shfl_down_sync(kAllLanes, level, 1);
      const uint32_t end = thread + 1 < codes ? places_end(level, next) : uint32_t{kNuqPlaces};
      const uint32_t end_below = __shfl_up_sync(kAllLanes, end, 1);
      if (thread < codes) {
        level = middle_level(memory.places, thread == 0 ? 0 : end_below, end, level);
      }
    }
    if (thread < kNuqLevels) {
      memory.levels[thread] = thread < codes ? stored_level(level) : 0;
      stored[thread] = static_cast<std::byte>(memory.levels[thread]);
    }
  }

  // out: the part. By the whole block; what codes are made from stands in shared memory behind a barrier.
  __device__ void fit_part(std::byte* out) const {
    std::byte* levels = out + 4 * kGroups;
    fit_means();
    __syncthreads();
    choose_outliers(reinterpret_cast<uint32_t*>(levels + kNuqLevels));
    __syncthreads();
    fit_ranges(reinterpret_cast<uint16_t*>(out));
    for (int i = thread; i <= kNuqPlaces; i += kHeadDim) {
      memory.places.count[i] = 0;
    }
    __syncthreads();
    for (int token = 0; token < held; ++token) {
      if (counts(thread, token)) {
        atomicAdd(&memory.places.count[__float2int_rn(nuq_place(position(thread, token)))], 1u);
      }
    }
    __syncthreads();
    if (thread < 32) {
      sum_places();
      fit_levels(levels);
    }
    __syncthreads();
  }

  __device__ uint32_t code(int dim, int token) const {
    return counts(dim, token) ? nuq_code(position(dim, token), memory.levels, part.bits) : nuq_middle_code(part.bits);
  }
};

}  // namespace vericache::cuda
