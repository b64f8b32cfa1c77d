// Bases of the values of a head page whose resident form is rotated (rotated_residual.h), 8 tokens at a time by a warp,
// as pairs of bf16.
// Device code; all lanes of a warp call together, the warps 0 .. 7 of a block each for 8 tokens.
#pragma once

#include "backend/cuda/affine_steps.cuh"
#include "backend/cuda/rotation.cuh"
#include "backend/rotated_residual.h"

namespace vericache::cuda {

constexpr int kOctets = kPageTokens / kLaneValues;

// A float that is a bf16, in both halves.
__device__ inline uint32_t pair_of(float x) {
  return (__float_as_uint(x) >> 16) * kBothHalves;
}

// What a head page's bases are made with, and how far values lie from them, below as negative numbers: bits of bf16. In
// shared memory.
template <int kHeadDim>
struct RotatedGroups {
  alignas(16) uint16_t key_scales[kHeadDim];  // by rotated_rest()
  uint16_t key_centres[kHeadDim];             // rotated
  uint16_t value_scales[kPageTokens];         // by rotation_scale()
  uint16_t value_centres[kPageTokens];        // rotated: of the first dim of a block
  uint16_t value_above[kPageTokens];
  uint16_t value_below[kPageTokens];
  uint16_t key_above[kHeadDim / 32];
  uint16_t key_below[kHeadDim / 32];

  // keys, values: the packed parts, looked at where the format has any. A block of three warps at least;
  // __syncthreads() before it is read.
  __device__ void fill(const KvFormat& format, const std::byte* keys, const std::byte* values) {
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread < kHeadDim / 4 && !format.key().exact()) {
      fill_keys(format, reinterpret_cast<const uint2*>(keys), thread);
    }
    if (thread >= 32 && thread < 32 + kPageTokens && !format.value().exact()) {
      fill_value(format.value_bits, reinterpret_cast<const uint16_t*>(values), thread - 32);
    }
  }

 private:
  static constexpr int kBlock = rotation_block(kHeadDim);
  static constexpr uint32_t kMinus = 0x8000u;

  // Four dims of K.
  __device__ void fill_keys(const KvFormat& format, const uint2* groups, int lane) {
    const int bits = format.key_bits;
    constexpr unsigned kLanes = kHeadDim == 128 ? kAllLanes : (1u << (kHeadDim / 4 % 32)) - 1;
    const uint2 scales = groups[lane];
    const uint2 minima = groups[kHeadDim / 4 + lane];
    const float4 scale = floats_of(scales);
    const float4 minimum = floats_of(minima);
    // In the order of rotation_sum().
    float squares = (scale.x * scale.x + scale.y * scale.y) + (scale.z * scale.z + scale.w * scale.w);
#pragma unroll
    for (int apart = 1; apart < kBlock / 4; apart *= 2) {
      squares += __shfl_xor_sync(kLanes, squares, apart);
    }
    const float4 centres = rotate_sums<kHeadDim>(
        make_float4(rotated_centre(scale.x, minimum.x, bits), rotated_centre(scale.y, minimum.y, bits),
                    rotated_centre(scale.z, minimum.z, bits), rotated_centre(scale.w, minimum.w, bits)));
    const uint32_t rest = pair_of(rotated_rest(kBlock));
    reinterpret_cast<uint2*>(key_scales)[lane] =
        make_uint2(multiply_pairs(scales.x, rest), multiply_pairs(scales.y, rest));
    reinterpret_cast<uint2*>(key_centres)[lane] =
        make_uint2(pack_pair(centres.x, centres.y), pack_pair(centres.z, centres.w));
    if (lane % 8 == 0) {
      const RotatedReach reach = rotated_reach(rotated_spread(bits, true) * squares, kBlock);
      key_above[lane / 8] = static_cast<uint16_t>(reach.above);
      key_below[lane / 8] = static_cast<uint16_t>(reach.below | kMinus);
    }
  }
  __device__ void fill_value(int bits, const uint16_t* groups, int token) {
    const uint32_t scale = groups[token];
    const float step = first_of_pair(scale);
    const RotatedReach reach = rotated_reach(rotated_spread(bits, false) * (step * step), 1);
    const float centre =
        rotated_centre(step, first_of_pair(groups[kPageTokens + token]), bits) * rotated_constant(kBlock);
    const uint32_t rest = pair_of(rotated_rest(kBlock));
    const uint32_t power = pair_of(rotation_power(kBlock));
    value_scales[token] = static_cast<uint16_t>(multiply_pairs(multiply_pairs(scale, rest), power));
    value_centres[token] = static_cast<uint16_t>(pack_pair(centre, 0.0f));
    value_above[token] = static_cast<uint16_t>(reach.above);
    value_below[token] = static_cast<uint16_t>(reach.below | kMinus);
  }
  __device__ static float4 floats_of(const uint2& pairs) {
    return make_float4(first_of_pair(pairs.x), second_of_pair(pairs.x), first_of_pair(pairs.y),
                       second_of_pair(pairs.y));
  }
};

// Eight bf16 in shared memory; first: a multiple of 8.
__device__ inline void read_eight(const uint16_t* shared, int first, uint32_t (&pairs)[kLanePairs]) {
  read16(reinterpret_cast<const std::byte*>(shared + first), pairs);
}

// The steps of the tokens 8 octet .. + 7, laid out as the bases below.
template <int kHeadDim, bool kKeys>
__device__ inline void read_rows_of_steps(int bits, const std::byte* part, int octet, int lane,
                                          uint32_t (&x)[kHeadDim / 32][kLanePairs]) {
  const auto read = [&](auto of) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const int dim = 32 * j + lane;
      const LanePlace at = kKeys ? LanePlace{8 * j + octet, 8 * octet + lane / 4, 32 * j + 8 * (lane % 4)}
                                 : LanePlace{octet / 4 * (kHeadDim / 8) + dim / 8, 8 * octet, dim};
      read_steps<kHeadDim, kKeys, decltype(of)::value>(part, at, x[j]);
    }
  };
  switch (bits) {
    case 2:
      return read(std::integral_constant<int, 2>());
    case 3:
      return read(std::integral_constant<int, 3>());
    case 4:
      return read(std::integral_constant<int, 4>());
    case 6:
      return read(std::integral_constant<int, 6>());
    default:
      return read(std::integral_constant<int, 8>());
  }
}

// The bases of the tokens 8 octet .. + 7 of K: bases[j] are of the row 8 j + octet, which holds 32 dims of these
// tokens.
template <int kHeadDim>
__device__ void key_bases(int bits, const std::byte* packed, const RotatedGroups<kHeadDim>& groups, int octet, int lane,
                          uint32_t (&bases)[kHeadDim / 32][kLanePairs]) {
  read_rows_of_steps<kHeadDim, true>(bits, packed, octet, lane, bases);
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    uint32_t scales[kLanePairs];
    read_eight(groups.key_scales, 32 * j + 8 * (lane % 4), scales);
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      bases[j][i] = multiply_pairs(bases[j][i], scales[i]);
    }
  }
  sum_eight<kHeadDim>(bases);
  const uint32_t power = pair_of(rotation_power(rotation_block(kHeadDim)));
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    uint32_t centres[kLanePairs];
    read_eight(groups.key_centres, 32 * j + 8 * (lane % 4), centres);
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      bases[j][i] = multiply_add_pairs(bases[j][i], power, centres[i]);
    }
  }
}

// The bases of the tokens 8 octet .. + 7 of V: bases[j] are those of the dim 32 j + lane.
template <int kHeadDim>
__device__ void value_bases(int bits, const std::byte* packed, const RotatedGroups<kHeadDim>& groups, int octet,
                            int lane, uint32_t (&bases)[kHeadDim / 32][kLanePairs]) {
  read_rows_of_steps<kHeadDim, false>(bits, packed, octet, lane, bases);
  sum_lanes<kHeadDim>(bases);
  uint32_t scales[kLanePairs];
  read_eight(groups.value_scales, 8 * octet, scales);
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      bases[j][i] = multiply_pairs(bases[j][i], scales[i]);
    }
  }
  if (lane == 0) {
    uint32_t centres[kLanePairs];
    read_eight(groups.value_centres, 8 * octet, centres);
#pragma unroll
    for (int j = 0; j < kHeadDim / rotation_block(kHeadDim); ++j) {
#pragma unroll
      for (int i = 0; i < kLanePairs; ++i) {
        uint32_t& base = bases[j * (rotation_block(kHeadDim) / 32)][i];
        base = add_pairs(base, centres[i]);
      }
    }
  }
}

}  // namespace vericache::cuda
