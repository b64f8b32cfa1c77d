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

// A lane's slots. Of free ones, and of values that a draft must not read, a distance of zero and any place.
struct LaneSlots {
  uint32_t place[4];
  uint32_t distance[4];  // bf16
};
// part: in shared memory; first: of the lane's slots.
template <bool kKeys, int kGroups>
__device__ inline LaneSlots read_slots(const std::byte* part, int bits, int slots, int first) {
  uint32_t words[4] = {kFreeSlot, kFreeSlot, kFreeSlot, kFreeSlot};
  if (first < slots) {
    read16(reinterpret_cast<const std::byte*>(slots_of(part, kGroups) + first), words);
  }
  const auto middle = static_cast<float>(levels_of(part, kGroups)[nuq_middle_code(bits)]);
  LaneSlots out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool read = slot_place(words[i]) != kFreeSlot && is_finite(slot_value(words[i]));
    out.place[i] = read ? slot_place(words[i]) : 0;
    const AffineBits group =
        affine_of(part, static_cast<int>(kKeys ? out.place[i] / kPageTokens : out.place[i] % kPageTokens), kGroups);
    const float coded = fmaf(first_of_pair(group.scale), middle, first_of_pair(group.minimum));
    out.distance[i] = read ? pack_pair(first_of_pair(slot_value(words[i])) - coded, 0.0f) : 0;
  }
  return out;
}

__device__ inline uint32_t join_pair(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
// Adds a step whose row of slot i is row[i], in the numbering in which low and low + 1 are the rows g and g + 8 of the
// tile; distance: zero where another g has the row.
__device__ inline void add_step(float (&tile)[4], const uint32_t (&row)[4], const uint32_t (&distance)[4], uint32_t low,
                                uint32_t b0, uint32_t b1) {
  uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[0][i] = row[i] == low ? distance[i] : 0;
    a[1][i] = row[i] == low + 1 ? distance[i] : 0;
  }
  tensor_step(tile, join_pair(a[0][0], a[0][1]), join_pair(a[1][0], a[1][1]), join_pair(a[0][2], a[0][3]),
              join_pair(a[1][2], a[1][3]), b0, b1);
}

// keys: the K part, up to its slots at least. q: of head g, null if there is none. scores: as DraftWarp has them.
template <int kHeadDim>
__device__ inline void score_outliers(const std::byte* keys, const KvPart& part, const uint16_t* q, int lane,
                                      float (&scores)[4][4]) {
  const auto g = static_cast<uint32_t>(lane / 4);
  const int slots = outlier_slots(part, kHeadDim);
  const uint32_t* all = slots_of(keys, kHeadDim);
#pragma unroll 1
  for (int first = 0; first < slots && slot_place(all[first]) != kFreeSlot; first += kStepSlots) {
    LaneSlots step = read_slots<true, kHeadDim>(keys, part.bits, slots, first + 4 * (lane % 4));
    uint32_t row[4];
    uint32_t query[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[i] = q == nullptr ? 0 : __ldg(q + step.place[i] / kPageTokens);
      const uint32_t token = step.place[i] % kPageTokens;  // score_token(), backwards
      row[i] = token / 32 * 4 + token % 8 / 2;
      step.distance[i] = token % 32 / 8 * 2 + token % 2 == g ? step.distance[i] : 0;
    }
    const uint32_t b0 = join_pair(query[0], query[1]);
    const uint32_t b1 = join_pair(query[2], query[3]);
#pragma unroll
    for (uint32_t tile = 0; tile < 4; ++tile) {
      add_step(scores[tile], row, step.distance, 2 * tile, b0, b1);
    }
  }
}

// Room for the weights of 8 heads and 64 tokens, bf16.
constexpr int kWeightBytes = 8 * kPageTokens * 2;

// values: the V part, up to its slots at least. room (kWeightBytes): shared memory of the warp, 16-byte aligned.
// weights, out: as DraftWarp has them.
template <int kHeadDim>
__device__ inline void add_outliers(const std::byte* values, const KvPart& part, const uint32_t (&weights)[8],
                                    std::byte* room, int lane, float (&out)[kHeadDim / 16][4]) {
  const int g = lane / 4;
  const int c = lane % 4;
  auto* of_tokens = reinterpret_cast<uint4*>(room) + g * (kPageTokens / 8) + c;
  of_tokens[0] = make_uint4(weights[0], weights[1], weights[2], weights[3]);
  of_tokens[4] = make_uint4(weights[4], weights[5], weights[6], weights[7]);
  __syncwarp();
  const auto* mine = reinterpret_cast<const uint16_t*>(room) + g * kPageTokens;
  const int slots = outlier_slots(part, kHeadDim);
  const uint32_t* all = slots_of(values, kPageTokens);
#pragma unroll 1
  for (int first = 0; first < slots && slot_place(all[first]) != kFreeSlot; first += kStepSlots) {
    LaneSlots step = read_slots<false, kPageTokens>(values, part.bits, slots, first + 4 * c);
    uint32_t row[4];
    uint32_t weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = mine[step.place[i] % kPageTokens];
      const uint32_t dim = step.place[i] / kPageTokens;
      row[i] = dim / 8;
      step.distance[i] = dim % 8 == static_cast<uint32_t>(g) ? step.distance[i] : 0;
    }
    const uint32_t b0 = join_pair(weight[0], weight[1]);
    const uint32_t b1 = join_pair(weight[2], weight[3]);
    // Slots lie by rising dim: few tiles have any of these.
    const uint32_t lowest = slot_place(all[first]) / kPageTokens / 16;
    const uint32_t highest = slot_place(all[min(first + kStepSlots, slots) - 1]) / kPageTokens / 16;
#pragma unroll
    for (uint32_t tile = 0; tile < kHeadDim / 16; ++tile) {
      if (tile >= lowest && tile <= highest) {
        add_step(out[tile], row, step.distance, 2 * tile, b0, b1);
      }
    }
  }
#ifdef VERICACHE_COPY_ENGINE
  // The copy engine may be the next to write to the room.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace vericache::cuda
