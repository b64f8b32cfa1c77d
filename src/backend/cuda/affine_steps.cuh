// Affine codes of a lane of a row as pairs of bf16 that count from the middle of the codes, whatever plane they lie in
// (packed_layout.h, chunk_layout.h).
// Device code; every lane by itself.
#pragma once

#include "backend/cuda/packed_math.cuh"
#include "backend/cuda/residual_row.cuh"

namespace vericache::cuda {

constexpr int kLanePairs = kLaneValues / 2;

// The codes of a lane of a row, less their middle: exact.
template <int kHeadDim, bool kKeys, int kBits>
__device__ inline void read_steps(const std::byte* part, const LanePlace& at, uint32_t (&pairs)[kLanePairs]) {
  constexpr KvPart kPart(kBits);
  const std::byte* codes = part + group_bytes(kPart, kHeadDim, kKeys ? kHeadDim : kPageTokens);
  if constexpr (chunked(kPart)) {
    const Run8 run = kKeys ? key_run(at.token, at.dim) : value_run(at.token, at.dim);
    const RunWords words = read_run(codes + run.chunk * chunk_bytes(kBits), kPart, run);
    if constexpr (kBits == 3) {
      // As run_of_threes(), its pairs one by one.
      const int of_four = 2 * run.x + run.row;
      const bool last = of_four == 3;
      const uint32_t own = of_four == 0 ? words.three[0] : of_four == 1 ? words.three[1] : words.three[2];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        pairs[i] = select_or((last ? words.three[i] : own) >> (last ? 12 : 3 * i), 0x00070007u, kLowExponent);
      }
      const uint32_t two = select_bits(0x80008000u, words.three[1], words.three[0] >> 1);
      const uint32_t three = select_bits(0x80008000u, words.three[2], two >> 1);
      pairs[3] = select_or((last ? three : own) >> (last ? 13 : 9), 0x00070007u, kLowExponent);
    } else {
      const uint32_t two = words.two >> (8 * run.row);
#pragma unroll
      for (int i = 0; i < kLanePairs; ++i) {
        const uint32_t high = i == 0 ? words.four << 2 : words.four >> (4 * i - 2);
        pairs[i] = select_or(two >> (2 * i), 0x00030003u, select_or(high, 0x003c003cu, kLowExponent));
      }
    }
  } else {
    const CodePlace place =
        kKeys ? key_place(at.token, at.dim, kBits == 2 ? 2 : 4) : value_place(at.token, at.dim, kBits == 2 ? 2 : 4);
    const auto* words = reinterpret_cast<const uint32_t*>(codes) + place.word;
    const uint32_t word = words[0] >> (kBits == 2 ? place.shift : 0);
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      pairs[i] = kBits == 2 ? select_or(word >> (2 * i), 0x00030003u, kLowExponent)
                            : select_or(word >> (4 * i), 0x000f000fu, kBits == 8 ? kHighExponent : kLowExponent);
    }
    if constexpr (kBits == 8) {
      // As they are read the high halves are 2048 more, the low ones 128; the middle is 128. Every sum is exact.
      uint32_t low[4];
      unpack4(words[plane_bytes(4, kHeadDim) / 4], kLowExponent, low);
#pragma unroll
      for (int i = 0; i < kLanePairs; ++i) {
        pairs[i] = add_pairs(add_pairs(pairs[i], 0xc510c510u), low[i]);
      }
    }
  }
  // As they are read other codes are 128 more.
#pragma unroll
  for (int i = 0; i < kLanePairs && kBits < 8; ++i) {
    pairs[i] = add_pairs(pairs[i], 0xc300c300u + (1u << (kBits - 1)) * kBothHalves);
  }
}

}  // namespace vericache::cuda
