// What the outliers of a nuq part (nuq_codes.h) add to a draft's scores and sums: their distance from what their codes
// say, as tensor-core steps whose k values are slots.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/packed_math.cuh"
#include "backend/nuq_codes.h"

namespace vericache::cuda {

// Slots of a step; lane 4 g + c has those from 4 c on, in every g.
constexpr int kStepSlots = 16;

// Makes slots of a part, which lies in the warp's shared memory, what steps read: the distance in the high half - zero
// where there is no outlier, or a draft must not read it - and the place in the low one, as place_of(dim, token) has
// it. How many slots are used.
template <bool kKeys, int kGroups, typename PlaceOf>
__device__ inline int prepare_slots(std::byte* part, int bits, int slots, int lane, const PlaceOf& place_of) {
  const auto middle = static_cast<float>(levels_of(part, kGroups)[nuq_middle_code(bits)]);
  auto* all = const_cast<uint32_t*>(slots_of(part, kGroups));
  int used = 0;
#pragma unroll 1
  for (int first = 0; first < slots; first += 32) {
    const int own = first + lane;
    const uint32_t slot = own < slots ? all[own] : kFreeSlot;
    const bool there = slot_place(slot) != kFreeSlot;
    const uint32_t now = __ballot_sync(kAllLanes, there);
    used += __popc(now);
    const uint32_t place = there ? slot_place(slot) : 0;
    const uint32_t dim = place / kPageTokens;
    const uint32_t token = place % kPageTokens;
    const AffineBits group = affine_of(part, static_cast<int>(kKeys ? dim : token), kGroups);
    const float coded = fmaf(first_of_pair(group.scale), middle, first_of_pair(group.minimum));
    const bool read = there && is_finite(slot_value(slot));
    const uint32_t distance = read ? pack_pair(0.0f, first_of_pair(slot_value(slot)) - coded) : 0;
    if (own < slots) {
      all[own] = distance | place_of(dim, token);
    }
    if (now != kAllLanes) {
      break;  // used ones come first
    }
  }
  __syncwarp();
  return used;
}
// The copy engine may be the next to write where a warp has written.
__device__ inline void leave_to_copies() {
#ifdef VERICACHE_COPY_ENGINE
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Four prepared slots.
struct SlotPairs {
  uint32_t slots[4];
  uint32_t places[2];     // pairs
  uint32_t distances[2];  // pairs of bf16
};
// used: slots that are, of those at `all`.
__device__ inline SlotPairs read_slots(const uint32_t* all, int first, int used) {
  SlotPairs out{};
  if (first < used) {
    read16(reinterpret_cast<const std::byte*>(all + first), out.slots);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    out.places[i] = __byte_perm(out.slots[2 * i], out.slots[2 * i + 1], 0x5410);
    out.distances[i] = __byte_perm(out.slots[2 * i], out.slots[2 * i + 1], 0x7632);
  }
  return out;
}

__device__ inline uint32_t join_pair(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
// `values` in the halves in which both pairs of numbers, below 1024, are the same; else zero. As fp16 such numbers are
// different ones.
__device__ inline uint32_t where_equal(uint32_t a, uint32_t b, uint32_t values) {
  uint32_t same;
  asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(same) : "r"(a), "r"(b));
  return values & same;
}
// Adds a step to the rows g and g + 8 of a tile, those of the slots in rows[i] that are `low` and `high`.
__device__ inline void add_step(float (&tile)[4], const uint32_t (&rows)[2], const uint32_t (&distances)[2],
                                uint32_t low, uint32_t high, uint32_t b0, uint32_t b1) {
  low *= kBothHalves;
  high *= kBothHalves;
  tensor_step(tile, where_equal(rows[0], low, distances[0]), where_equal(rows[0], high, distances[0]),
              where_equal(rows[1], low, distances[1]), where_equal(rows[1], high, distances[1]), b0, b1);
}

// keys: the K part, up to its slots at least, in the warp's shared memory: the slots are not what they were afterwards.
// q: of head g, null if there is none. scores: as DraftWarp has them.
template <int kHeadDim>
__device__ inline void score_outliers(std::byte* keys, const KvPart& part, const uint16_t* q, int lane,
                                      float (&scores)[4][4]) {
  // score_token(), backwards: the row among the 8 that a lane of g holds, and its g. As many as tokens.
  const auto row_of = [](uint32_t token) {
    return (token / 32 * 4 + token % 8 / 2) * 8 + (token % 32 / 8 * 2 + token % 2);
  };
  const int used =
      prepare_slots<true, kHeadDim>(keys, part.bits, outlier_slots(part, kHeadDim), lane,
                                    [&](uint32_t dim, uint32_t token) { return dim * kPageTokens + row_of(token); });
  const uint32_t* all = slots_of(keys, kHeadDim);
  const auto g = static_cast<uint32_t>(lane / 4);
#pragma unroll 1
  for (int first = 0; first < used; first += kStepSlots) {
    const SlotPairs step = read_slots(all, first + 4 * (lane % 4), used);
    uint32_t query[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[i] = q == nullptr ? 0 : __ldg(q + slot_place(step.slots[i]) / kPageTokens);
    }
    const uint32_t b0 = join_pair(query[0], query[1]);
    const uint32_t b1 = join_pair(query[2], query[3]);
    const uint32_t rows[2] = {step.places[0] & (kPageTokens - 1) * kBothHalves,
                              step.places[1] & (kPageTokens - 1) * kBothHalves};
#pragma unroll
    for (uint32_t tile = 0; tile < 4; ++tile) {
      add_step(scores[tile], rows, step.distances, 16 * tile + g, 16 * tile + 8 + g, b0, b1);
    }
  }
  leave_to_copies();
}

// Room for the weights of 8 heads and 64 tokens, bf16.
constexpr int kWeightBytes = 8 * kPageTokens * 2;

// values: the V part, likewise. room (kWeightBytes): shared memory of the warp, 16-byte aligned. weights, out: as
// DraftWarp has them.
template <int kHeadDim>
__device__ inline void add_outliers(std::byte* values, const KvPart& part, const uint32_t (&weights)[8],
                                    std::byte* room, int lane, float (&out)[kHeadDim / 16][4]) {
  constexpr uint32_t kDims = 128;  // a power of two, of any head
  static_assert(kHeadDim <= kDims);
  const int g = lane / 4;
  const int c = lane % 4;
  auto* of_tokens = reinterpret_cast<uint4*>(room) + g * (kPageTokens / 8) + c;
  of_tokens[0] = make_uint4(weights[0], weights[1], weights[2], weights[3]);
  of_tokens[4] = make_uint4(weights[4], weights[5], weights[6], weights[7]);
  const int used = prepare_slots<false, kPageTokens>(values, part.bits, outlier_slots(part, kHeadDim), lane,
                                                     [](uint32_t dim, uint32_t token) { return token * kDims + dim; });
  const uint32_t* all = slots_of(values, kPageTokens);
  const auto* mine = reinterpret_cast<const uint16_t*>(room) + g * kPageTokens;
  const auto dim_of = [&](int slot) { return slot_place(all[slot]) % kDims; };
#pragma unroll 1
  for (int first = 0; first < used; first += kStepSlots) {
    const SlotPairs step = read_slots(all, first + 4 * c, used);
    uint32_t weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = mine[slot_place(step.slots[i]) / kDims];
    }
    const uint32_t b0 = join_pair(weight[0], weight[1]);
    const uint32_t b1 = join_pair(weight[2], weight[3]);
    const uint32_t rows[2] = {step.places[0] & (kDims - 1) * kBothHalves, step.places[1] & (kDims - 1) * kBothHalves};
    // Slots lie by rising dim: few tiles have any of these.
    const uint32_t lowest = dim_of(first) / 16;
    const uint32_t highest = dim_of(min(first + kStepSlots, used) - 1) / 16;
#pragma unroll
    for (uint32_t tile = 0; tile < kHeadDim / 16; ++tile) {
      if (tile >= lowest && tile <= highest) {
        add_step(out[tile], rows, step.distances, 16 * tile + static_cast<uint32_t>(g),
                 16 * tile + 8 + static_cast<uint32_t>(g), b0, b1);
      }
    }
  }
  leave_to_copies();
}

}  // namespace vericache::cuda
