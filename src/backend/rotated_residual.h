// Exact residuals of rotated formats (quarot): what a resident page says of a head vector before it was rotated, as a
// value and how far from it the vector's own lies, nearly always.
// Pure; any thread. The arithmetic of one value is host and device code.
#pragma once

#include <cmath>
#include <vector>

#include "backend/residual_code.h"
#include "backend/rotation.h"

namespace vericache {

// A rotated value lies within half a step of what its code stands for, anywhere there. Turned back, each value takes
// the errors of its whole block, and their sum is nearly normal: its variance is the mean square of the steps over 12.
// As many of its deviations are likely: a wider reach costs bits, a narrower one escapes, and a field goes on below
// because its codes are a power of two. Measured: docs/compressors.md.
inline constexpr float kDeviationsAbove = 2.28f;
inline constexpr float kDeviationsBelow = 1.6f;

// How far the magnitudes of values lie from those of their bases: bits of bf16, neither negative nor infinite.
struct RotatedReach {
  uint32_t above = 0;
  uint32_t below = 0;
};
// Of a block of `steps` steps, whose squares have that sum.
VERICACHE_BOTH inline RotatedReach rotated_reach(float squares, int steps) {
  const float variance = squares * (1.0f / (12.0f * static_cast<float>(steps)));
#ifdef __CUDA_ARCH__
  const float deviation = __fsqrt_rn(variance);
#else
  const float deviation = std::sqrt(variance);
#endif
  constexpr float kMost = 0x1.fep127f;  // of bf16
  const uint32_t pair =
      residual_round(fminf(deviation * kDeviationsAbove, kMost), fminf(deviation * kDeviationsBelow, kMost));
  return {pair & 0xffffu, pair >> 16};
}

// The field of a value whose base is that bf16: the magnitudes in reach, and smaller ones as far as its bits can count.
// A float holds the sum of two bf16 so nearly that rounding it rounds the exact one.
VERICACHE_BOTH inline ResidualField rotated_field(uint32_t base, const RotatedReach& reach) {
  const float distance = float_of_bits((base & kMagnitudeBits) << 16);
  const uint32_t range =
      residual_round(distance - float_of_bits(reach.below << 16), distance + float_of_bits(reach.above << 16));
  const bool either_sign = (range & 0x8000u) != 0;
  const uint32_t high = range >> 16;
  const uint32_t low = either_sign ? 0 : range & 0x7fffu;
  const int bits = residual_log2(high - low + 2);
  return {high + 1, bits < kOpenBits ? bits : kOpenBits, either_sign, !either_sign && base >> 15 != 0, true};
}

// Bases and reaches of a packed K or V part of a head page, whose codes are affine. Channels that only fill a key up to
// key_dim() are not rotated: there the base is what the code stands for.
class RotatedBase {
 public:
  struct Code {
    uint32_t code = 0;
    ResidualGroup group;
  };
  // code_at(token, dim): the Code there; asked for every token and dim.
  template <typename CodeAt>
  RotatedBase(const KvShape& shape, bool keys, const CodeAt& code_at)
      : keys_(keys),
        dims_(keys ? shape.key_dim() : shape.head_dim),
        base_(size_t{kPageTokens} * static_cast<size_t>(dims_)) {
    std::vector<float> scales(static_cast<size_t>(keys ? dims_ : kPageTokens));
    std::vector<float> x(static_cast<size_t>(dims_));
    for (int token = 0; token < kPageTokens; ++token) {
      for (int dim = 0; dim < dims_; ++dim) {
        const Code at = code_at(token, dim);
        const float scale = float_of_bits(at.group.first << 16);
        // The product is exact: only the sum rounds.
        x[static_cast<size_t>(dim)] = static_cast<float>(at.code) * scale + float_of_bits(at.group.second << 16);
        scales[static_cast<size_t>(keys ? dim : token)] = scale;
      }
      rotate(x.data(), shape.head_dim);
      for (int dim = 0; dim < dims_; ++dim) {
        base_[place(token, dim)] = static_cast<uint16_t>(residual_round(x[static_cast<size_t>(dim)], 0.0f));
      }
    }
    find_reaches(scales, keys ? rotation_block(shape.head_dim) : 1, keys ? shape.head_dim : kPageTokens);
  }
  ResidualField field(int token, int dim) const {
    return rotated_field(base_[place(token, dim)], reach_[static_cast<size_t>(keys_ ? dim : token)]);
  }

 private:
  // scales: those from `rotated` on are of codes that stand for themselves.
  void find_reaches(const std::vector<float>& scales, int steps, int rotated) {
    std::vector<float> squares(scales);
    for (float& x : squares) {
      x *= x;
    }
    for (int i = 0; i < static_cast<int>(scales.size()); ++i) {
      const size_t first = static_cast<size_t>(i / steps * steps);  // of the value's block
      reach_.push_back(i < rotated ? rotated_reach(rotation_sum(&squares[first], steps), steps)
                                   : rotated_reach(squares[static_cast<size_t>(i)], 1));
    }
  }

  size_t place(int token, int dim) const {
    return static_cast<size_t>(token) * static_cast<size_t>(dims_) + static_cast<size_t>(dim);
  }

  bool keys_;
  int dims_;
  std::vector<uint16_t> base_;       // bf16 (tokens, dims)
  std::vector<RotatedReach> reach_;  // of K per dim, of V per token
};

}  // namespace vericache
