// The outliers of nuq parts among residuals: they are resident as they are, and cross as fields of no bits.
// Device code; all threads of a block call what ends with a barrier.
#pragma once

#include "backend/cuda/residual_reader.cuh"

namespace vericache::cuda {

template <typename Format>
constexpr bool kApart = false;  // some values are resident as they are
template <int kBits>
constexpr bool kApart<FixedPart<kBits, KvCode::nuq>> = true;

// Which values of a nuq part are outliers: a byte for the 8 values of every lane of every row, lanes after one another.
VERICACHE_BOTH constexpr int outlier_map_bytes(const KvPart& part, int head_dim) {
  return part.code == KvCode::nuq && !part.exact() ? kPageTokens * head_dim / 8 : 0;
}
// The value's place among those of the bf16 part.
template <int kHeadDim, bool kKeys>
__device__ inline uint32_t outlier_index(uint32_t slot) {
  const auto dim = static_cast<int>(slot_place(slot)) / kPageTokens;
  const auto token = static_cast<int>(slot_place(slot)) % kPageTokens;
  return static_cast<uint32_t>(kKeys ? key_index(token, dim) : value_index(token, dim, kHeadDim));
}
// map (outlier_map_bytes): shared memory, 4-byte aligned. All `kThreads` threads of the block; ends with a barrier.
template <int kHeadDim, bool kKeys, int kThreads>
__device__ inline void map_outliers(const std::byte* packed, const KvPart& part, uint32_t* map) {
  for (int i = static_cast<int>(threadIdx.x); i < outlier_map_bytes(part, kHeadDim) / 4; i += kThreads) {
    map[i] = 0;
  }
  __syncthreads();
  const uint32_t* slots = slots_of(packed, kKeys ? kHeadDim : kPageTokens);
  for (int i = static_cast<int>(threadIdx.x); i < outlier_slots(part, kHeadDim); i += kThreads) {
    if (slot_place(slots[i]) != kFreeSlot) {
      const uint32_t index = outlier_index<kHeadDim, kKeys>(slots[i]);
      atomicOr(map + index / 32, 1u << (index % 32));
    }
  }
  __syncthreads();
}
// Of a lane's values in a row of the part.
__device__ inline uint32_t outliers_of(const uint32_t* map, int row, int lane) {
  return reinterpret_cast<const uint8_t*>(map)[row * 32 + lane];
}

// Outliers leave nothing open.
__device__ inline void close_fields(uint32_t outliers, uint32_t (&fields)[kLaneValues]) {
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    fields[i] = (outliers >> i & 1) != 0 ? 0 : fields[i];
  }
}
// Over what coded rows gave for them. All threads of the block, when all rows are written. out: the bf16 head page.
template <int kHeadDim, bool kKeys, int kThreads>
__device__ void write_outliers(const BlockReader& block, const std::byte* packed, const KvPart& part, uint16_t* out) {
  constexpr uint32_t kPartRows = kPageTokens * kHeadDim / kRowValues;
  const uint32_t* slots = slots_of(packed, kKeys ? kHeadDim : kPageTokens);
  for (int i = static_cast<int>(threadIdx.x); i < outlier_slots(part, kHeadDim); i += kThreads) {
    if (slot_place(slots[i]) == kFreeSlot) {
      continue;
    }
    const uint32_t index = outlier_index<kHeadDim, kKeys>(slots[i]) + (kKeys ? 0 : kPartRows * kRowValues);
    if (!block.row(static_cast<int>(index / kRowValues)).raw()) {
      out[index] = static_cast<uint16_t>(slot_value(slots[i]));
    }
  }
}

// What an encoding block knows of the outliers of its head page, of K and of V.
template <int kHeadDim>
struct OutlierMaps {
  uint32_t map[2][kHeadDim * kPageTokens / 32];
  uint32_t wrong[2];  // rows in which a slot holds another value than the page: they stay as they are
};
// All threads of the block; ends with a barrier. part: packed; page: the bf16 head page.
template <int kHeadDim, bool kKeys, int kThreads>
__device__ void map_part(const KvPart& format, const std::byte* part, const std::byte* page,
                         OutlierMaps<kHeadDim>& maps) {
  constexpr int kAt = kKeys ? 0 : 1;
  if (format.code != KvCode::nuq || format.exact()) {
    return;
  }
  if (threadIdx.x == 0) {
    maps.wrong[kAt] = 0;
  }
  map_outliers<kHeadDim, kKeys, kThreads>(part, format, maps.map[kAt]);
  const auto* values = reinterpret_cast<const uint16_t*>(page) + (kKeys ? 0 : kHeadDim * kPageTokens);
  const uint32_t* slots = slots_of(part, kKeys ? kHeadDim : kPageTokens);
  for (int i = static_cast<int>(threadIdx.x); i < outlier_slots(format, kHeadDim); i += kThreads) {
    if (slot_place(slots[i]) != kFreeSlot) {
      const uint32_t index = outlier_index<kHeadDim, kKeys>(slots[i]);
      if (values[index] != slot_value(slots[i])) {
        atomicOr(&maps.wrong[kAt], 1u << (index / kRowValues));
      }
    }
  }
  __syncthreads();
}

// Those of a row of part 0 (K) or 1 (V).
template <int kHeadDim>
__device__ inline void close_fields(const OutlierMaps<kHeadDim>& maps, int part, int row,
                                    const uint32_t (&values)[kLaneValues], ResidualField (&fields)[kLaneValues]) {
  static_assert(kPageTokens * kHeadDim / kRowValues <= 32);
  const uint32_t outliers = outliers_of(maps.map[part], row, static_cast<int>(threadIdx.x) % 32);
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    fields[i] = (outliers >> i & 1) != 0 ? outlier_field(values[i]) : fields[i];
  }
  if ((maps.wrong[part] >> row & 1) != 0) {
    fields[0] = outlier_field(values[0] ^ 1u);  // does not fit
  }
}

}  // namespace vericache::cuda
