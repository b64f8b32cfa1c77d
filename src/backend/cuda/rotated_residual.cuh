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

// What the 8 codes of a lane of a row stand for.
template <typename Part>
__device__ inline void decode_lane(const Part& own, const std::byte* packed, const LanePlace& at,
                                   float (&x)[kLaneValues]) {
  own.with_codes(packed, at, [&](int i, uint32_t code, const ResidualGroup& group) {
    // Codes are below 2^23: as the last bits of 2^23 they need no conversion.
    const float step = __uint_as_float(0x4b000000u | code) - 0x1p23f;
    x[i] = step * first_of_pair(group.first) + first_of_pair(group.second);
  });
}
__device__ inline void pack_bases(const float (&x)[kLaneValues], uint32_t (&bases)[kLaneValues / 2]) {
#pragma unroll
  for (int i = 0; i < kLaneValues / 2; ++i) {
    bases[i] = pack_pair(x[2 * i], x[2 * i + 1]);
  }
}

// The bases of the tokens 8 octet .. + 7 of K, pairs of bf16: bases[j] are of the row 8 j + octet, which holds 32 dims
// of these tokens.
template <int kHeadDim>
__device__ void key_bases(const KvPart& format, const std::byte* packed, int octet, int lane,
                          uint32_t (&bases)[kHeadDim / 32][kLaneValues / 2]) {
  float x[kHeadDim / 32][kLaneValues];
  with_affine_part<kHeadDim, true>(format.bits, [&](const auto& own) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      decode_lane(own, packed, {8 * j + octet, 8 * octet + lane / 4, 32 * j + 8 * (lane % 4)}, x[j]);
    }
  });
  rotate_eight<kHeadDim>(x);
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    pack_bases(x[j], bases[j]);
  }
}
// How far the values of K lie from them, by 32 dims.
template <int kHeadDim>
__device__ void key_reaches(const std::byte* packed, int lane, RotatedReach (&reaches)[kHeadDim / 32]) {
  constexpr int kBlock = rotation_block(kHeadDim);
  const uint2 scales = lane < kHeadDim / 4 ? reinterpret_cast<const uint2*>(packed)[lane] : make_uint2(0, 0);
  const auto squares = [](uint32_t pair) {
    const float first = first_of_pair(pair);
    const float second = second_of_pair(pair);
    return first * first + second * second;
  };
  // In the order of rotation_sum().
  float sum = squares(scales.x) + squares(scales.y);
#pragma unroll
  for (int apart = 1; apart < kBlock / 4; apart *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, apart);
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    reaches[j] = rotated_reach(__shfl_sync(kAllLanes, sum, 8 * j), kBlock);
  }
}

// The bases of the tokens 8 octet .. + 7 of V, pairs of bf16: bases[j] are those of the dim 32 j + lane.
template <int kHeadDim>
__device__ void value_bases(const KvPart& format, const std::byte* packed, int octet, int lane,
                            uint32_t (&bases)[kHeadDim / 32][kLaneValues / 2]) {
  float x[kHeadDim / 32][kLaneValues];
  with_affine_part<kHeadDim, false>(format.bits, [&](const auto& own) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const int dim = 32 * j + lane;
      decode_lane(own, packed, {octet / 4 * (kHeadDim / 8) + dim / 8, 8 * octet, dim}, x[j]);
    }
  });
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
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    pack_bases(x[j], bases[j]);
  }
}

// The bases of K or V in shared memory, as the lanes of its rows ask for them, and how far values lie from them.
template <int kHeadDim>
struct RotatedPart {
  uint4 bases[kHeadDim / 4][32];  // (rows, lanes in an order of their own)
  uint16_t above[kPageTokens];    // of K per 32 dims, of V per token
  uint16_t below[kPageTokens];

  // Lanes 4 d + o of a row are written by one octet o at a time, d = 0 .. 7, and read one after the other: either way
  // eight of them take all banks.
  __device__ static int place(int lane) { return lane ^ lane >> 3; }

  __device__ void put(int row, int lane, const uint32_t (&pairs)[kLaneValues / 2]) {
    bases[row][place(lane)] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  __device__ void put_reach(int index, const RotatedReach& reach) {
    above[index] = static_cast<uint16_t>(reach.above);
    below[index] = static_cast<uint16_t>(reach.below);
  }
  // Whole block; __syncthreads() before it is read.
  template <bool kKeys>
  __device__ void fill(const KvPart& format, const std::byte* packed) {
    const auto octet = static_cast<int>(threadIdx.x / 32);
    const auto lane = static_cast<int>(threadIdx.x % 32);
    uint32_t pairs[kHeadDim / 32][kLaneValues / 2];
    if constexpr (kKeys) {
      RotatedReach reaches[kHeadDim / 32];
      key_reaches<kHeadDim>(packed, lane, reaches);
      key_bases<kHeadDim>(format, packed, octet, lane, pairs);
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        put(8 * j + octet, lane, pairs[j]);
        if (threadIdx.x == 0) {
          put_reach(j, reaches[j]);
        }
      }
    } else {
      value_bases<kHeadDim>(format, packed, octet, lane, pairs);
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        const int dim = 32 * j + lane;
        put(octet / 4 * (kHeadDim / 8) + dim / 8, 4 * (dim % 8) + octet % 4, pairs[j]);
      }
      if (threadIdx.x < kPageTokens) {
        const float scale = first_of_pair(reinterpret_cast<const uint16_t*>(packed)[threadIdx.x]);
        put_reach(static_cast<int>(threadIdx.x), rotated_reach(scale * scale, 1));
      }
    }
  }
  __device__ uint4 read(int row, int lane) const {
    return bases[row][place(lane)];
  }
  // The field of value i of a lane of a row.
  template <bool kKeys>
  __device__ ResidualField field(int row, int lane, int i) const {
    const auto* own = reinterpret_cast<const uint16_t*>(&bases[row][place(lane)]);
    const int of = kKeys ? row / 8 : lane_place<kHeadDim, false>(row, lane).token + i;
    return rotated_field(own[i], {above[of], below[of]});
  }
};

// rotated_field() of a pair of bases in words, in the halves of words as far as they allow, without a branch. above,
// below: pairs as well, and the latter of the other sign.
__device__ inline void pack_rotated_fields(uint32_t bases, uint32_t above, uint32_t below, uint32_t& first,
                                           uint32_t& second) {
  constexpr uint32_t kOnes = 0x00010001u;
  constexpr uint32_t kMost = ((1u << kOpenBits) - 1) * kOnes;
  const uint32_t distance = bases & 0x7fff7fffu;
  const uint32_t high = add_pairs(distance, above);
  const uint32_t low = add_pairs(distance, below);
  const uint32_t either = fill_halves(low);
  const uint32_t count = __vminu2(high - (low & ~either) + kOnes, kMost);
  // Of two signs one is set, as kCodesSign wants it.
  const uint32_t tops = high + kOnes + ((bases | either) & 0x80008000u);
  constexpr uint32_t kSignBit = (kCodesSign & 0xffffu) + 1;
  first = tops * 0x10000u + (either & kSignBit) + static_cast<uint32_t>(highest_bit(count & 0xffffu) + 1);
  second = (tops & 0xffff0000u) + (either >> 31) * kSignBit + static_cast<uint32_t>(highest_bit(count) - 15);
}
// The fields of a lane's values. above, below: as there, of K the same pair.
__device__ inline void pack_rotated_row(const uint32_t (&bases)[kLaneValues / 2],
                                        const uint32_t (&above)[kLaneValues / 2],
                                        const uint32_t (&below)[kLaneValues / 2], uint32_t (&fields)[kLaneValues]) {
#pragma unroll
  for (int i = 0; i < kLaneValues / 2; ++i) {
    pack_rotated_fields(bases[i], above[i], below[i], fields[2 * i], fields[2 * i + 1]);
  }
}
__device__ inline void words_of(const uint4& four, uint32_t (&words)[4]) {
  words[0] = four.x;
  words[1] = four.y;
  words[2] = four.z;
  words[3] = four.w;
}

// The rows of K or V. packed: in shared memory, or nothing where the part is exact; put(row of the block, lane, its
// values). A whole block of kOctets warps; `shared` is read until the last row of V is.
template <int kHeadDim, bool kKeys, typename Put>
__device__ void decode_rotated(const BlockReader& block, const KvPart& format, const std::byte* packed,
                               RotatedPart<kHeadDim>* shared, const Put& put) {
  constexpr int kRows = kHeadDim / 4;  // of K, and as many of V
  constexpr int kFirst = kKeys ? 0 : kRows;
  constexpr uint32_t kMinus = 0x80008000u;
  constexpr int kTogether = kKeys && kHeadDim % 64 != 0 ? 1 : 2;
  const auto warp = static_cast<int>(threadIdx.x / 32 % kOctets);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  // Rows that lie about these bases, kTogether of them.
  const auto read_rows = [&](const int(&at)[kTogether], const uint32_t(&fields)[kTogether][kLaneValues]) {
    RowSpan rows[kTogether];
    uint4 values[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      rows[r] = block.row(at[r]);
    }
    read_coded<LikelyEscapes>(block, rows, fields, values);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      put(at[r], lane, rows[r].raw() ? read_raw(block, rows[r].begin, lane) : values[r]);
    }
  };
  if (format.exact()) {
    for (int row = kFirst + warp; row < kFirst + kRows; row += kOctets) {
      put(row, lane, read_alone(block, block.row(row), lane));
    }
  } else if constexpr (kKeys) {
    RotatedReach reaches[kHeadDim / 32];
    key_reaches<kHeadDim>(packed, lane, reaches);
    uint32_t bases[kHeadDim / 32][kLaneValues / 2];
    key_bases<kHeadDim>(format, packed, warp, lane, bases);
#pragma unroll
    for (int first = 0; first < kHeadDim / 32; first += kTogether) {
      int at[kTogether];
      uint32_t fields[kTogether][kLaneValues];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int j = first + r;
        at[r] = 8 * j + warp;
        const uint32_t above = reaches[j].above * 0x10001u;
        const uint32_t below = reaches[j].below * 0x10001u ^ kMinus;
        pack_rotated_row(bases[j], {above, above, above, above}, {below, below, below, below}, fields[r]);
      }
      read_rows(at, fields);
    }
  } else {
    shared->template fill<false>(format, packed);
    __syncthreads();
#pragma unroll 1
    for (int octet = warp; octet < kHeadDim / 8; octet += kOctets) {
      int at[kTogether];
      uint32_t fields[kTogether][kLaneValues];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int row = octet + r * (kHeadDim / 8);
        const int token = 32 * r + 8 * (lane % 4);
        at[r] = kFirst + row;
        uint32_t bases[kLaneValues / 2];
        uint32_t above[kLaneValues / 2];
        uint32_t below[kLaneValues / 2];
        words_of(shared->read(row, lane), bases);
        words_of(*reinterpret_cast<const uint4*>(shared->above + token), above);
        words_of(*reinterpret_cast<const uint4*>(shared->below + token), below);
#pragma unroll
        for (uint32_t& pair : below) {
          pair ^= kMinus;
        }
        pack_rotated_row(bases, above, below, fields[r]);
      }
      read_rows(at, fields);
    }
  }
}

}  // namespace vericache::cuda
