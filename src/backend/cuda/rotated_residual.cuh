// Rows of an encoded head page whose resident form is rotated (rotated_residual.h): bases are made 8 tokens at a time
// by a warp, and rows are read from them.
// Device code; all lanes of a warp call together, the warps 0 .. 7 of a block each for 8 tokens.
#pragma once

#include "backend/cuda/residual_reader.cuh"
#include "backend/cuda/rotation.cuh"
#include "backend/rotated_residual.h"

namespace vericache::cuda {

constexpr int kOctets = kPageTokens / kLaneValues;

// run(PackedPart) of affine codes.
template <int kHeadDim, bool kKeys, typename Run>
__device__ inline void with_affine_part(int bits, const Run& run) {
  switch (bits) {
    case 2:
      return run(PackedPart<kHeadDim, kKeys, FixedPart<2>>());
    case 3:
      return run(PackedPart<kHeadDim, kKeys, FixedPart<3>>());
    case 4:
      return run(PackedPart<kHeadDim, kKeys, FixedPart<4>>());
    case 6:
      return run(PackedPart<kHeadDim, kKeys, FixedPart<6>>());
    default:
      return run(PackedPart<kHeadDim, kKeys, FixedPart<8>>());
  }
}

// What the 8 codes of a lane of a row stand for, and their scales.
template <typename Part>
__device__ inline void decode_lane(const Part& own, const std::byte* packed, const LanePlace& at,
                                   float (&x)[kLaneValues], float (&scales)[kLaneValues]) {
  own.with_codes(packed, at, [&](int i, uint32_t code, const ResidualGroup& group) {
    // Codes are below 2^23: as the last bits of 2^23 they need no conversion.
    const float step = __uint_as_float(0x4b000000u | code) - 0x1p23f;
    scales[i] = first_of_pair(group.first);
    x[i] = step * scales[i] + first_of_pair(group.second);
  });
}

// The bases of the tokens 8 octet .. + 7 of K, and how far values lie from them: x[j] and reach[j] are of the row
// 8 j + octet, which holds 32 dims of these tokens.
template <int kHeadDim, typename Part>
__device__ void key_bases(const Part& own, const std::byte* packed, int octet, int lane,
                          float (&x)[kHeadDim / 32][kLaneValues], float (&reach)[kHeadDim / 32]) {
  constexpr int kBlock = rotation_block(kHeadDim);
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    float s[kLaneValues];
    decode_lane(own, packed, {8 * j + octet, 8 * octet + lane / 4, 32 * j + 8 * (lane % 4)}, x[j], s);
    // In the order of rotation_sum().
    const float low = (s[0] * s[0] + s[1] * s[1]) + (s[2] * s[2] + s[3] * s[3]);
    const float high = (s[4] * s[4] + s[5] * s[5]) + (s[6] * s[6] + s[7] * s[7]);
    reach[j] = low + high;
    reach[j] += __shfl_xor_sync(kAllLanes, reach[j], 1);
    reach[j] += __shfl_xor_sync(kAllLanes, reach[j], 2);
  }
#pragma unroll
  for (int apart = 1; apart < kBlock / 32; apart *= 2) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      if ((j & apart) == 0) {
        reach[j] += reach[j + apart];
        reach[j + apart] = reach[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    reach[j] = rotated_reach(reach[j], kBlock);
  }
  rotate_eight<kHeadDim>(x);
}

// The bases of the tokens 8 octet .. + 7 of V: x[j] are those of the dim 32 j + lane.
template <int kHeadDim, typename Part>
__device__ void value_bases(const Part& own, const std::byte* packed, int octet, int lane,
                            float (&x)[kHeadDim / 32][kLaneValues]) {
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    float scales[kLaneValues];
    const int dim = 32 * j + lane;
    decode_lane(own, packed, {octet / 4 * (kHeadDim / 8) + dim / 8, 8 * octet, dim}, x[j], scales);
  }
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    float token[kHeadDim / 32];
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      token[j] = x[j][i];
    }
    rotate_lanes<kHeadDim>(token);
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      x[j][i] = token[j];
    }
  }
}

// The bases of K or V in shared memory, as the lanes of its rows ask for them.
template <int kHeadDim>
struct RotatedPart {
  float4 bases[kHeadDim / 4][2][32];  // (rows, halves of a lane's values, lanes in an order of their own)
  float reaches[kPageTokens];         // of K per 32 dims, of V per token

  // Lanes 4 d + o of a row are written by one octet o at a time, d = 0 .. 7, and read one after the other: either way
  // eight of them take all banks.
  __device__ static int place(int lane) { return lane ^ lane >> 3; }

  __device__ void put(int row, int lane, const float (&x)[kLaneValues]) {
    bases[row][0][place(lane)] = make_float4(x[0], x[1], x[2], x[3]);
    bases[row][1][place(lane)] = make_float4(x[4], x[5], x[6], x[7]);
  }
  // Whole block; __syncthreads() before it is read.
  template <bool kKeys>
  __device__ void fill(const KvPart& format, const std::byte* packed) {
    const auto octet = static_cast<int>(threadIdx.x / 32);
    const auto lane = static_cast<int>(threadIdx.x % 32);
    float x[kHeadDim / 32][kLaneValues];
    if constexpr (kKeys) {
      float reach[kHeadDim / 32];
      with_affine_part<kHeadDim, true>(
          format.bits, [&](const auto& own) { key_bases<kHeadDim>(own, packed, octet, lane, x, reach); });
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        put(8 * j + octet, lane, x[j]);
        if (threadIdx.x == 0) {
          reaches[j] = reach[j];
        }
      }
    } else {
      with_affine_part<kHeadDim, false>(format.bits,
                                        [&](const auto& own) { value_bases<kHeadDim>(own, packed, octet, lane, x); });
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        const int dim = 32 * j + lane;
        put(octet / 4 * (kHeadDim / 8) + dim / 8, 4 * (dim % 8) + octet % 4, x[j]);
      }
      if (threadIdx.x < kPageTokens) {
        const float scale = first_of_pair(reinterpret_cast<const uint16_t*>(packed)[threadIdx.x]);
        reaches[threadIdx.x] = rotated_reach(scale * scale, 1);
      }
    }
  }
  template <bool kKeys>
  __device__ void read(int row, int lane, float (&base)[kLaneValues], float (&reach)[kLaneValues]) const {
    take(bases[row][0][place(lane)], bases[row][1][place(lane)], base);
    if constexpr (kKeys) {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        reach[i] = reaches[row / 8];
      }
    } else {
      const auto* of = reinterpret_cast<const float4*>(reaches) + row / (kHeadDim / 8) * 8 + 2 * (lane % 4);
      take(of[0], of[1], reach);
    }
  }

 private:
  __device__ static void take(const float4& low, const float4& high, float (&out)[kLaneValues]) {
    out[0] = low.x;
    out[1] = low.y;
    out[2] = low.z;
    out[3] = low.w;
    out[4] = high.x;
    out[5] = high.y;
    out[6] = high.z;
    out[7] = high.w;
  }
};

// rotated_field() in a word, without a branch.
__device__ inline uint32_t pack_rotated_field(float base, float reach) {
  const uint32_t range = rotated_range(base, reach);
  // The number of magnitudes in the high half, the smallest in the low one.
  const uint32_t count = range * 0xffff0001u + 0x10000u;
  const auto bits = static_cast<uint32_t>(__viaddmin_s32(highest_bit(count), -15, kOpenBits));
  const int spare = max(static_cast<int>(low_ones(bits) - (count >> 16)), 0);
  const uint32_t top = (range & 0xffff0000u) + static_cast<uint32_t>(spare) / 2 * 0x10000u;
  const bool either = rotated_either_sign(base, reach);
  return top + bits + (either ? kCodesSign + 1u : __float_as_uint(base) & 0x80000000u);
}

// A row whose values lie about these bases.
__device__ inline uint4 read_rotated(const BlockReader& block, const RowSpan& row, int lane,
                                     const float (&base)[kLaneValues], const float (&reach)[kLaneValues]) {
  if (row.raw()) {
    return read_raw(block, row.begin, lane);
  }
  const RowSpan rows[1] = {row};
  uint32_t fields[1][kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    fields[0][i] = pack_rotated_field(base[i], reach[i]);
  }
  uint4 values[1];
  read_coded<LikelyEscapes>(block, rows, fields, values);
  return values[0];
}

// The rows of K or V. packed: in shared memory, or nothing where the part is exact; put(row of the block, lane, its
// values). A whole block of kOctets warps; `shared` is read until the last row of V is.
template <int kHeadDim, bool kKeys, typename Put>
__device__ void decode_rotated(const BlockReader& block, const KvPart& format, const std::byte* packed,
                               RotatedPart<kHeadDim>* shared, const Put& put) {
  constexpr int kRows = kHeadDim / 4;  // of K, and as many of V
  constexpr int kFirst = kKeys ? 0 : kRows;
  const auto warp = static_cast<int>(threadIdx.x / 32 % kOctets);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  if (format.exact()) {
    for (int row = kFirst + warp; row < kFirst + kRows; row += kOctets) {
      put(row, lane, read_alone(block, block.row(row), lane));
    }
  } else if constexpr (kKeys) {
    float x[kHeadDim / 32][kLaneValues];
    float reach[kHeadDim / 32];
    with_affine_part<kHeadDim, true>(format.bits,
                                     [&](const auto& own) { key_bases<kHeadDim>(own, packed, warp, lane, x, reach); });
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const float same[kLaneValues] = {reach[j], reach[j], reach[j], reach[j], reach[j], reach[j], reach[j], reach[j]};
      const int row = kFirst + 8 * j + warp;
      put(row, lane, read_rotated(block, block.row(row), lane, x[j], same));
    }
  } else {
    shared->template fill<false>(format, packed);
    __syncthreads();
    for (int row = warp; row < kRows; row += kOctets) {
      float base[kLaneValues];
      float reach[kLaneValues];
      shared->template read<false>(row, lane, base, reach);
      put(kFirst + row, lane, read_rotated(block, block.row(kFirst + row), lane, base, reach));
    }
  }
}

}  // namespace vericache::cuda
