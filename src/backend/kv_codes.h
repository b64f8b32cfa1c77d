// What one code of a resident format says, value by value: the meaning that every backend's kernels keep to.
// Host and device code; pure; any thread.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/kv_view.h"

namespace vericache {

// The bits of a bf16: sign, 8 of exponent, 7 of mantissa.
constexpr uint32_t kMagnitudeBits = 0x7fffu;
constexpr uint32_t kSpecialExponent = 255;  // infinities and NaN

// Plane codes of 5 + M bits, from the highest: the sign, a rank of 4 bits, the first M bits of the mantissa. A token's
// `base` is the largest exponent of its finite values, K and V apart; rank = 15 - (base - exponent), and rank 0 is the
// escape: an exponent that lies 15 or more below the base, or a value that is not finite. Sign and mantissa are the
// bf16's own bits in every case, so what a code lacks is the rest of the mantissa, and of an escape the exponent.
// fp8 has the same form with M = 3, rounded to nearest: there rank 0 is one more binade, and stands for all below.
struct PlaneBits {
  uint32_t sign = 0;
  uint32_t distance = 0;  // base - exponent, 15 = escape
  uint32_t mantissa = 0;  // the first M bits
};
VERICACHE_BOTH constexpr PlaneBits plane_bits(uint32_t code, int bits) {
  const int kept = bits - 5;
  return {code >> (bits - 1) & 1u, 15u - (code >> kept & 15u), code & ((1u << kept) - 1)};
}

// What the base is the largest exponent of: the magnitude, rounded for fp8; 0 for what is not finite.
VERICACHE_BOTH constexpr uint32_t ranked_magnitude(uint32_t value, KvCode code) {
  uint32_t magnitude = value & kMagnitudeBits;
  if (magnitude >> 7 == kSpecialExponent) {
    return 0;
  }
  if (code == KvCode::fp8) {
    magnitude = (magnitude + 7u + (magnitude >> 4 & 1u)) & ~15u;
    magnitude = magnitude >> 7 == kSpecialExponent ? 0x7f70u : magnitude;
  }
  return magnitude;
}

// value: the bits of a bf16.
VERICACHE_BOTH constexpr uint32_t plane_code(uint32_t value, const KvPart& part, uint32_t base) {
  const int kept = part.bits - 5;
  const bool finite = (value & kMagnitudeBits) >> 7 != kSpecialExponent;
  const uint32_t magnitude = part.code == KvCode::fp8 ? ranked_magnitude(value, part.code) : value & kMagnitudeBits;
  const uint32_t distance = finite ? base - (magnitude >> 7) : 15u;
  const uint32_t rank = distance < 15u ? 15u - distance : 0u;
  uint32_t mantissa = (magnitude & 127u) >> (7 - kept);
  if (part.code == KvCode::fp8 && distance > 15u) {
    mantissa = 0;
  }
  return (value >> 15) << (part.bits - 1) | rank << kept | mantissa;
}

// The bf16 that a draft reads: of planes the middle of what the code leaves open. Always finite, and small enough for
// sums of products: a larger base counts as this one.
constexpr uint32_t kMostReadBase = 200;
VERICACHE_BOTH constexpr uint32_t plane_value(uint32_t code, const KvPart& part, uint32_t base) {
  const int kept = part.bits - 5;
  const uint32_t exponent = (base < kMostReadBase ? base : kMostReadBase) + (code >> kept & 15u);  // too large by 15
  const uint32_t middle = part.code == KvCode::plane ? 1u << (6 - kept) : 0;
  const uint32_t mantissa = (code & ((1u << kept) - 1)) << (7 - kept) | middle;
  return (code >> (part.bits - 1)) << 15 | (exponent < 15u ? 0 : (exponent - 15u) << 7 | mantissa);
}

// int8: two's complement, -127 .. 127. What is not finite counts as zero, and so does a token whose largest magnitude
// is so small that its scale would not be a normal number.
constexpr uint32_t kLeastInt8 = 27u << 7;  // 2^-100
constexpr uint32_t kMostInt8 = 250u << 7;  // 2^123: every product of a code and the scale is finite
VERICACHE_BOTH inline float float_of_bits(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}
// The scale of a token, as bits of a bf16: the smallest that takes `top`, the largest magnitude, to 127 or less.
VERICACHE_BOTH inline uint32_t int8_scale(uint32_t top) {
  if (top < kLeastInt8) {
    return 0;
  }
  const float exact = float_of_bits((top < kMostInt8 ? top : kMostInt8) << 16) / 127.0f;
  uint32_t bits;
  memcpy(&bits, &exact, sizeof(bits));
  return (bits + 0xffffu) >> 16;
}
VERICACHE_BOTH constexpr int int8_of(uint32_t code) {
  return static_cast<int>(code ^ 128u) - 128;
}

}  // namespace vericache
