// Rows of an encoded head page whose resident form is rotated (rotated_residual.h): what lies about their bases.
// Device code; all lanes of a warp call together, the warps 0 .. 7 of a block each for 8 tokens.
#pragma once

#include "backend/cuda/residual_reader.cuh"
#include "backend/cuda/rotated_bases.cuh"

namespace vericache::cuda {

// The bases of K or V in shared memory, as the lanes of its rows ask for them.
template <int kHeadDim>
struct RotatedBases {
  uint4 rows[kHeadDim / 4][32];  // lanes in an order of their own

  // Whole block; `packed` may lie here: all of it has been read before anything is written. __syncthreads() before this
  // is read.
  template <bool kKeys>
  __device__ void fill(int bits, const std::byte* packed, const RotatedGroups<kHeadDim>& groups) {
    const auto octet = static_cast<int>(threadIdx.x / 32);
    const auto lane = static_cast<int>(threadIdx.x % 32);
    uint32_t pairs[kHeadDim / 32][kLanePairs];
    if constexpr (kKeys) {
      key_bases<kHeadDim>(bits, packed, groups, octet, lane, pairs);
    } else {
      value_bases<kHeadDim>(bits, packed, groups, octet, lane, pairs);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const int dim = 32 * j + lane;
      uint4& to = kKeys ? rows[8 * j + octet][place(lane)]
                        : rows[octet / 4 * (kHeadDim / 8) + dim / 8][place(4 * (dim % 8) + octet % 4)];
      to = make_uint4(pairs[j][0], pairs[j][1], pairs[j][2], pairs[j][3]);
    }
  }
  __device__ const uint4& of(int row, int lane) const {
    return rows[row][place(lane)];
  }

 private:
  // Lanes 4 d + o of a row are written by one octet o at a time, d = 0 .. 7, and read one after the other: either way
  // eight of them take all banks.
  __device__ static int place(int lane) {
    return lane ^ lane >> 3;
  }
};

// rotated_field() of a pair of bases in words, in the halves of words as far as they allow, without a branch. above,
// below: pairs as well, and the latter negative.
__device__ inline void pack_rotated_fields(uint32_t bases, uint32_t above, uint32_t below, uint32_t& first,
                                           uint32_t& second) {
  constexpr uint32_t kMost = (1u << (kLikelyBits - 1)) * kBothHalves;
  const uint32_t distance = bases & kBothMagnitudes;
  const uint32_t high = add_pairs(distance, above);
  const uint32_t low = add_pairs(distance, below);
  const uint32_t either = fill_halves(low);
  const uint32_t bits = bit_lengths(__vminu2(high - (low & ~either) + kBothHalves, kMost));
  join_fields(high + ((bases | either) & kBothSigns) + kBothHalves, bits | (either & kBothSigns), first, second);
}
// The fields of a lane's values. above, below: as there, of K the same pair.
__device__ inline void pack_rotated_row(const uint32_t (&bases)[kLanePairs], const uint32_t (&above)[kLanePairs],
                                        const uint32_t (&below)[kLanePairs], uint32_t (&fields)[kLaneValues]) {
#pragma unroll
  for (int i = 0; i < kLanePairs; ++i) {
    pack_rotated_fields(bases[i], above[i], below[i], fields[2 * i], fields[2 * i + 1]);
  }
}

// The rows of K or V. packed: in shared memory, or nothing where the part is exact; put(row of the block, lane, its
// values); values: of V, written when neither `packed` is read any longer, where it may lie, and read until the last
// row of V is. A whole block of kOctets warps.
template <int kHeadDim, bool kKeys, typename Put>
__device__ void decode_rotated(const BlockReader& block, const KvPart& format, const std::byte* packed,
                               const RotatedGroups<kHeadDim>& groups, RotatedBases<kHeadDim>& values, const Put& put) {
  constexpr int kRows = kHeadDim / 4;  // of K, and as many of V
  constexpr int kFirst = kKeys ? 0 : kRows;
  constexpr int kTogether = kKeys && kHeadDim % 64 != 0 ? 1 : 2;
  const auto warp = static_cast<int>(threadIdx.x / 32 % kOctets);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  // Rows that lie about these bases, kTogether of them.
  const auto read_rows = [&](const int(&at)[kTogether], const uint32_t(&fields)[kTogether][kLaneValues]) {
    RowSpan rows[kTogether];
    uint4 out[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      rows[r] = block.row(at[r]);
    }
    read_coded<LikelyEscapes>(block, rows, fields, out);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      put(at[r], lane, rows[r].raw() ? read_raw(block, rows[r].begin, lane) : out[r]);
    }
  };
  if (format.exact()) {
    for (int row = kFirst + warp; row < kFirst + kRows; row += kOctets) {
      put(row, lane, read_alone(block, block.row(row), lane));
    }
  } else if constexpr (kKeys) {
    uint32_t bases[kHeadDim / 32][kLanePairs];
    key_bases<kHeadDim>(format.bits, packed, groups, warp, lane, bases);
#pragma unroll
    for (int first = 0; first < kHeadDim / 32; first += kTogether) {
      int at[kTogether];
      uint32_t fields[kTogether][kLaneValues];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int j = first + r;
        at[r] = 8 * j + warp;
        const uint32_t above = groups.key_above[j] * kBothHalves;
        const uint32_t below = groups.key_below[j] * kBothHalves;
        pack_rotated_row(bases[j], {above, above, above, above}, {below, below, below, below}, fields[r]);
      }
      read_rows(at, fields);
    }
  } else {
    values.template fill<false>(format.bits, packed, groups);
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
        const uint4& own = values.of(row, lane);
        const uint32_t bases[kLanePairs] = {own.x, own.y, own.z, own.w};
        uint32_t above[kLanePairs];
        uint32_t below[kLanePairs];
        read_eight(groups.value_above, token, above);
        read_eight(groups.value_below, token, below);
        pack_rotated_row(bases, above, below, fields[r]);
      }
      read_rows(at, fields);
    }
  }
}

}  // namespace vericache::cuda
