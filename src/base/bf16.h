// bf16: the 16-bit storage type of weights and KV. Arithmetic is done in float.
// Plain data; any thread.
#pragma once

#include <bit>
#include <cstdint>

namespace vericache {

struct bf16 {
  uint16_t bits;
  friend bool operator==(bf16, bf16) = default;
};

inline float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// The smallest bf16 that is not below x, for x >= 0; NaN stays NaN.
inline bf16 round_up_to_bf16(float x) {
  const bf16 below{static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)};
  return to_float(below) < x ? bf16{static_cast<uint16_t>(below.bits + 1)} : below;
}

// Round to nearest, ties to even; NaN stays NaN (quiet).
inline bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  }
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

}  // namespace vericache
