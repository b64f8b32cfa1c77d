// Operands of tensor-core steps from the words of packed_layout.h, and what makes products with them exact.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/warp_ops.cuh"

namespace vericache::cuda {

__device__ inline uint4 read16(const std::byte* at) {
  return *reinterpret_cast<const uint4*>(at);
}
__device__ inline void read16(const std::byte* at, uint32_t (&words)[4]) {
  const uint4 read = read16(at);
  words[0] = read.x;
  words[1] = read.y;
  words[2] = read.z;
  words[3] = read.w;
}

// bf16 pairs from codes. The exponents are those of 128 (codes 0 .. 15), of 2048 (the high halves of 8-bit codes: its
// last place is worth 16) and, for 2-bit codes that stand 0, 2 or 4 bits up, of 128, 32 and 8.
constexpr uint32_t kLowExponent = 0x43004300u;
constexpr uint32_t kHighExponent = 0x45004500u;

// A query or a weight times a scale is rounded to bf16 once more; what that costs grows with the codes that it meets.
// So codes count from their middle: value = minimum + middle scale + (code - middle) scale, where only the last product
// is of the rounded kind.
struct Middle {
  uint32_t code;   // 2, 8, 128
  uint32_t minus;  // negative, with what the exponents add: 136, or 2048 + 128 + 128
};
__device__ inline Middle middle_of(int bits) {
  return bits == 2   ? Middle{0x40004000u, 0}
         : bits == 4 ? Middle{0x41004100u, 0xc308c308u}
                     : Middle{0x43004300u, 0xc510c510u};
}

__device__ inline void unpack4(uint32_t word, uint32_t exponent, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = select_or(word >> (4 * i), 0x000f000fu, exponent);
  }
}
__device__ inline void unpack2(uint32_t word, uint32_t (&pairs)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t exponent = i % 3 == 0 ? 0x43004300u : i % 3 == 1 ? 0x42004200u : 0x41004100u;
    pairs[i] = select_or(word >> (6 * (i / 3)), 0x00030003u << (2 * (i % 3)), exponent);
  }
}
// Middle::minus of unpack2's pair i: 128, 32 or 8, and 2.
__device__ inline constexpr uint32_t minus2(int i) {
  return i % 3 == 0 ? 0xc302c302u : i % 3 == 1 ? 0xc208c208u : 0xc120c120u;
}

// What a group of 32 k values adds to every row of a product with codes. by_middle: -(middle + exponent) scaled.
// by_affine: minimum plain in the accumulators of row g, middle scale plain in those of row g + 8, and both count in
// every row.
template <bool kTwoBits>
__device__ inline void correct(const Middle& middle, const uint32_t (&scale)[4], const uint32_t (&minimum)[4],
                               const uint32_t* scaled, const uint32_t* plain, float (&by_middle)[4],
                               float (&by_affine)[4]) {
  uint32_t center[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    center[i] = multiply_pairs(scale[i], middle.code);
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    tensor_step(by_affine, minimum[2 * s], center[2 * s], minimum[2 * s + 1], center[2 * s + 1], plain[2 * s],
                plain[2 * s + 1]);
    if (kTwoBits) {
      tensor_step(by_middle, minus2(2 * s), minus2(4 + 2 * s), minus2(2 * s + 1), minus2(5 + 2 * s), scaled[2 * s],
                  scaled[2 * s + 1]);
    } else {
      tensor_step(by_middle, middle.minus, middle.minus, middle.minus, middle.minus, scaled[2 * s], scaled[2 * s + 1]);
    }
  }
}

}  // namespace vericache::cuda
