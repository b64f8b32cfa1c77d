// Operands of tensor-core steps from the words of chunk_layout.h: shifts and masks put the planes' pieces together.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/level_reader.cuh"
#include "backend/cuda/packed_math.cuh"

namespace vericache::cuda {

// Bits [from, ..) of both half words moved to [to, ..), and no others, beside those of `beside`. `mask`: of the target.
template <int kFrom, int kTo>
__device__ inline uint32_t place_bits(uint32_t word, uint32_t mask, uint32_t beside) {
  return select_or(kFrom >= kTo ? word >> (kFrom - kTo) : word << (kTo - kFrom), mask, beside);
}

// Reads a chunk of codes of kBits bits as bf16: of planes and fp8 the value as far as its token's base says no more,
// 2^(rank - 15) times the mantissa; of int8 the code; of affine ones 128 + code.
template <int kBits, KvCode kOf>
class ChunkReader {
 public:
  static constexpr int kCodeBits = kBits;
  static constexpr KvCode kCode = kOf;
  static constexpr bool kByToken = kCode != KvCode::affine;

  // Codes say what they say without.
  struct Levels {
    __device__ explicit Levels(const uint8_t* /*at*/) {}
  };

  __device__ ChunkReader(const std::byte* chunk, int lane, const Levels& /*levels*/)
      : chunk_(chunk), lane_(lane), narrow_(chunk, lane) {}

  // Tiles (r, 0) and (r, 1): pairs of rows g and g + 8.
  template <int kR>
  __device__ void tiles(uint32_t (&pairs)[2][2][4]) const {
    uint32_t four[4] = {};
    if constexpr ((kBits & 4) != 0) {
      read16(chunk_ + plane_in_chunk(kBits, 4) + (kR * 32 + lane_) * 16, four);
    }
    tile<kR, 0>(four, pairs[0]);
    tile<kR, 1>(four, pairs[1]);
  }

 private:
  template <int kR, int kX>
  __device__ void tile(const uint32_t (&four)[4], uint32_t (&pairs)[2][4]) const {
    uint32_t wide[4] = {};
    if constexpr ((kBits & 8) != 0) {
      read16(chunk_ + ((kR * 2 + kX) * 32 + lane_) * 16, wide);
    }
    run<kR, kX, 0>(four, wide, pairs[0]);
    run<kR, kX, 1>(four, wide, pairs[1]);
  }

  template <int kR, int kX, int kRow>
  __device__ void run(const uint32_t (&four)[4], const uint32_t (&wide)[4], uint32_t (&pairs)[4]) const {
    pair<kR, kX, kRow, 0>(four, wide, pairs[0]);
    pair<kR, kX, kRow, 1>(four, wide, pairs[1]);
    pair<kR, kX, kRow, 2>(four, wide, pairs[2]);
    pair<kR, kX, kRow, 3>(four, wide, pairs[3]);
  }

  template <int kR, int kX, int kRow, int kPair>
  __device__ void pair(const uint32_t (&four)[4], const uint32_t (&wide)[4], uint32_t& out) const {
    constexpr int kTwo = 2 * kPair + 8 * kRow;         // where the pair lies in its word of the plane of 2 bits
    constexpr int kOne = kPair + 4 * (2 * kX + kRow);  // and of 1 bit
    const uint32_t of_eight = wide[2 * kRow + kPair / 2];
    const uint32_t of_four = four[2 * kX + kRow];
    const uint32_t of_two = narrow_.two[2 * kR + kX];
    const uint32_t of_one = narrow_.one[kR];
    if constexpr (kCode == KvCode::affine && kBits == 3) {
      constexpr int kRun = 2 * kX + kRow;
      const uint32_t words[3] = {narrow_.two[2 * kR], narrow_.two[2 * kR + 1], of_one};
      if constexpr (kRun < 3) {
        out = place_bits<3 * kPair, 0>(words[kRun], 0x00070007u, kLowExponent);
      } else if constexpr (kPair < 3) {
        out = place_bits<12, 0>(words[kPair], 0x00070007u, kLowExponent);
      } else {
        out = place_bits<15, 0>(words[0], 0x00010001u, kLowExponent);
        out = place_bits<15, 1>(words[1], 0x00020002u, out);
        out = place_bits<15, 2>(words[2], 0x00040004u, out);
      }
    } else if constexpr (kCode == KvCode::affine) {
      static_assert(kBits == 6);
      out = place_bits<4 * kPair, 2>(of_four, 0x003c003cu, kLowExponent);
      out = place_bits<kTwo, 0>(of_two, 0x00030003u, out);
    } else if constexpr (kCode == KvCode::int8) {
      // (128 + the low 7 bits) - (128, or 256 of a negative code)
      constexpr int kByte = kPair % 2 * 8;
      const uint32_t low = place_bits<kByte, 0>(of_eight, 0x007f007fu, kLowExponent);
      out = add_pairs(low, place_bits<kByte, 0>(of_eight, 0x00800080u, kLowExponent | 0x80008000u));
    } else if constexpr (kBits >= 8) {
      if constexpr (kPair % 2 == 0) {
        out = select_or(of_eight, 0x87f087f0u, kBeside);
      } else {
        out = select_or(__funnelshift_r(of_eight, of_eight, 4), 0x87808780u, kBeside);
        out = place_bits<0, 4>(of_eight, 0x00700070u, out);
      }
      if constexpr (kBits == 9) {
        out = place_bits<kOne, 3>(of_one, 0x00080008u, out);
      }
    } else {
      out = place_bits<4 * kPair, 7>(of_four, 0x07800780u, kBeside);
      constexpr int kP = kPair + 4 * kRow;
      if constexpr (kP < 7) {
        out = place_bits<0, kP>(of_two, 0x80408040u, out);
      } else {
        out = place_bits<0, kP>(of_two, 0x80008000u, out);
        out = place_bits<1, 0>(of_two, 0x00400040u, out);
      }
      if constexpr (kBits == 7) {
        out = place_bits<kOne, 5>(of_one, 0x00200020u, out);
      }
    }
  }

  // Of planes and fp8: the exponent 112 + rank, and the middle of what the code leaves open.
  static constexpr uint32_t kMiddle = kCode == KvCode::plane ? 1u << (6 - (kBits - 5)) : 0;
  static constexpr uint32_t kBeside = 0x38003800u | kMiddle << 16 | kMiddle;

  const std::byte* chunk_;
  int lane_;
  NarrowPlanes<kBits> narrow_;
};

// Calls run with the type of reader for a chunked format.
template <typename Run>
__device__ inline void for_reader(const KvPart& part, const Run& run) {
  switch (part.code) {
    case KvCode::affine:
      return part.bits == 3 ? run.template operator()<ChunkReader<3, KvCode::affine>>()
                            : run.template operator()<ChunkReader<6, KvCode::affine>>();
    case KvCode::nuq:
      return part.bits == 2   ? run.template operator()<LevelReader<2>>()
             : part.bits == 3 ? run.template operator()<LevelReader<3>>()
                              : run.template operator()<LevelReader<4>>();
    case KvCode::fp8:
      return run.template operator()<ChunkReader<8, KvCode::fp8>>();
    case KvCode::int8:
      return run.template operator()<ChunkReader<8, KvCode::int8>>();
    case KvCode::plane:
      switch (part.bits) {
        case 6:
          return run.template operator()<ChunkReader<6, KvCode::plane>>();
        case 7:
          return run.template operator()<ChunkReader<7, KvCode::plane>>();
        case 8:
          return run.template operator()<ChunkReader<8, KvCode::plane>>();
        default:
          return run.template operator()<ChunkReader<9, KvCode::plane>>();
      }
  }
}

// As middle_of, of affine codes and of levels, which are read as 128 + themselves.
template <typename Reader>
__device__ inline Middle chunk_middle() {
  return Reader::kCode == KvCode::nuq ? Middle{0x42804280u, 0xc340c340u}
         : Reader::kCodeBits == 3     ? Middle{0x40804080u, 0xc304c304u}
                                      : Middle{0x42004200u, 0xc320c320u};
}

// What the tokens 32 u + 8c .. + 7 are multiplied by, as pairs of bf16; groups: of a part by token. Of planes a power
// of two, with the base no larger than kMostReadBase.
__device__ inline uint32_t base_pair(uint32_t bytes) {
  const uint32_t first = min(bytes & 255u, kMostReadBase);
  const uint32_t second = min(bytes >> 8 & 255u, kMostReadBase);
  return first << 7 | second << 23;
}
template <bool kInt8>
__device__ inline void token_scales(const std::byte* groups, int first, uint32_t (&pairs)[4]) {
  if constexpr (kInt8) {
    read16(groups + first * 2, pairs);
  } else {
    const uint2 bases = *reinterpret_cast<const uint2*>(groups + first);
    pairs[0] = base_pair(bases.x);
    pairs[1] = base_pair(bases.x >> 16);
    pairs[2] = base_pair(bases.y);
    pairs[3] = base_pair(bases.y >> 16);
  }
}

}  // namespace vericache::cuda
