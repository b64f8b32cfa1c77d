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
__device__ inline void decode_lane(const Part& own, const std::byte* packed, int row, int lane, float (&x)[kLaneValues],
                                   float (&scales)[kLaneValues]) {
  own.with_codes(packed, row, lane, [&](int i, uint32_t code, const ResidualGroup& group) {
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
    decode_lane(own, packed, 8 * j + octet, lane, x[j], s);
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
    decode_lane(own, packed, octet / 4 * (kHeadDim / 8) + dim / 8, 4 * (dim % 8) + octet % 4, x[j], scales);
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
    const int octet = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
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

// rotated_field() in a word, without a branch: its bits in the first byte, in the second whether the sign is one of
// them, top and sign in the high half. The low bits count modulo 32 wherever they shift or mask, whatever stands above.
__device__ inline uint32_t pack_rotated_field(float base, float reach) {
  const uint32_t range = rotated_range(base, reach);
  // The number of magnitudes in the high half, the smallest in the low one.
  const uint32_t count = range * 0xffff0001u + 0x10000u;
  const uint32_t bits = min(31u - static_cast<uint32_t>(__clz(static_cast<int>(count))), 15u + kOpenBits) - 15u;
  const int spare = max(static_cast<int>(low_ones(bits) - (count >> 16)), 0);
  const uint32_t moved = range + static_cast<uint32_t>(spare) / 2 * 0x10000u;
  const bool either = rotated_either_sign(base, reach);
  const uint32_t low = bits + (either ? 0x101u : 0);
  return __byte_perm(low, moved, 0x7610) | (either ? 0 : __float_as_uint(base) & 0x80000000u);
}

// A row of `halves` whose values lie about these bases.
__device__ inline uint4 read_rotated(const BlockReader& block, uint32_t begin, uint32_t halves,
                                     const float (&base)[kLaneValues], const float (&reach)[kLaneValues]) {
  static_assert(kLaneValues == 8 && 4 * kMostFieldBits <= 64 && 3 * kMostFieldBits < 32);
  uint32_t fields[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    fields[i] = pack_rotated_field(base[i], reach[i]);
  }
  const uint32_t first_bits = (fields[0] + fields[1] + fields[2] + fields[3]) & 0xffu;
  const uint32_t own_bits = (first_bits + fields[4] + fields[5] + fields[6] + fields[7]) & 0xffu;
  int total;
  const uint32_t first = begin * 16 + static_cast<uint32_t>(sum_below(static_cast<int>(own_bits), total));
  uint32_t values[kLaneValues];  // in the high halves
  uint32_t turned[kLaneValues];  // the sign, where it is coded, in the highest bit
  uint32_t escaped = 0;          // a bit each
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t low;
    uint32_t high;
    block.window(first + (half == 0 ? 0 : first_bits), low, high);
    uint32_t at = 0;
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      const uint32_t mask = low_ones(fields[i]);
      const uint32_t coded = __funnelshift_r(low, high, at) & mask;
      const uint32_t below = __funnelshift_r(coded, coded, fields[i] >> 8);
      values[i] = fields[i] - below * 0x10000u;
      turned[i] = below;
      escaped |= (coded | (fields[i] >> 8 & 1u)) == mask ? 1u << i : 0;
      at += fields[i];
    }
  }
  const uint32_t coded_halves = (static_cast<uint32_t>(total) + 15) / 16;
  if (halves > coded_halves) {
    int escapes;
    uint32_t next = begin + coded_halves + static_cast<uint32_t>(sum_below(__popc(escaped), escapes));
    if (escaped != 0) {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        if ((escaped >> i & 1u) != 0) {
          values[i] = block.half(next++) << 16;
          turned[i] = 0;
        }
      }
    }
  }
  return make_uint4(join_signed(values, turned), join_signed(values + 2, turned + 2),
                    join_signed(values + 4, turned + 4), join_signed(values + 6, turned + 6));
}

// Row `row` of a block of `rows`: as it is, or what read(begin, halves) makes of it.
template <typename Read>
__device__ inline uint4 read_row(const BlockReader& block, int row, int rows, int lane, const Read& read) {
  const uint32_t begin = row == 0 ? static_cast<uint32_t>(rows) : block.half(static_cast<uint32_t>(row - 1));
  const uint32_t halves = block.half(static_cast<uint32_t>(row)) - begin;
  return halves == kRowHalves ? read_raw(block, begin, lane) : read(begin, halves);
}

// The rows of K or V. packed: in shared memory, or nothing where the part is exact. A whole block of kOctets warps;
// `shared` is read until the last row of V is.
template <int kHeadDim, bool kKeys>
__device__ void decode_rotated(const BlockReader& block, const KvPart& format, const std::byte* packed,
                               RotatedPart<kHeadDim>* shared, uint4* out) {
  constexpr int kRows = kHeadDim / 4;  // of K, and as many of V
  constexpr int kFirst = kKeys ? 0 : kRows;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto decode_row = [&](int row, const auto& read) {
    out[(kFirst + row) * 32 + lane] = read_row(block, kFirst + row, 2 * kRows, lane, read);
  };
  if (format.exact()) {
    for (int row = warp; row < kRows; row += kOctets) {
      decode_row(row, [&](uint32_t begin, uint32_t) { return read_lossless(block, begin, lane); });
    }
  } else if constexpr (kKeys) {
    float x[kHeadDim / 32][kLaneValues];
    float reach[kHeadDim / 32];
    with_affine_part<kHeadDim, true>(format.bits,
                                     [&](const auto& own) { key_bases<kHeadDim>(own, packed, warp, lane, x, reach); });
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const float same[kLaneValues] = {reach[j], reach[j], reach[j], reach[j], reach[j], reach[j], reach[j], reach[j]};
      decode_row(8 * j + warp,
                 [&](uint32_t begin, uint32_t halves) { return read_rotated(block, begin, halves, x[j], same); });
    }
  } else {
    shared->template fill<false>(format, packed);
    __syncthreads();
    for (int row = warp; row < kRows; row += kOctets) {
      float base[kLaneValues];
      float reach[kLaneValues];
      shared->template read<false>(row, lane, base, reach);
      decode_row(row, [&](uint32_t begin, uint32_t halves) { return read_rotated(block, begin, halves, base, reach); });
    }
  }
}

}  // namespace vericache::cuda
