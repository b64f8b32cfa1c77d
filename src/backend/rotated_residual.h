// Exact residuals of rotated formats (quarot): what a resident page says of a head vector before it was rotated, as a
// value and how far from it the vector's own lies, nearly always.
// Pure; any thread. The arithmetic of one value is host and device code.
#pragma once

#include <cfloat>
#include <cmath>
#include <vector>

#include "backend/residual_code.h"
#include "backend/rotation.h"

namespace vericache {

// A rotated value lies within half a step of what its code stands for, anywhere there. Turned back, each value takes
// the errors of its whole block, and their sum is nearly normal: its variance is the mean square of the steps over 12.
// kRotatedReach of its deviations to either side are likely. A wider reach costs bits, a narrower one escapes, and a
// field reaches up to twice as far because its codes are a power of two. Measured: docs/compressors.md.
inline constexpr float kRotatedReach = 1.9f;
VERICACHE_BOTH constexpr float rotated_reach_factor(int steps) {
  return kRotatedReach * kRotatedReach / (12.0f * static_cast<float>(steps));
}
// How far a value lies from its base: of a block of as many steps, whose squares have that sum.
VERICACHE_BOTH inline float rotated_reach(float squares, int steps) {
  const float variance = squares * rotated_reach_factor(steps);
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(variance);
#else
  return std::sqrt(variance);
#endif
}

// The magnitudes within `reach` of `base`, the smallest in the low half: bf16, rounded. NaN counts as no bound, and so
// does what overflows.
VERICACHE_BOTH inline uint32_t rotated_range(float base, float reach) {
  const float distance = fabsf(base);
  return residual_round(fmaxf(distance - reach, 0.0f), fminf(distance + reach, FLT_MAX));
}
VERICACHE_BOTH inline bool rotated_either_sign(float base, float reach) {
  return !(fabsf(base) > reach);
}

// The field of a value that is likely to lie within `reach` of `base`: the magnitudes in there, and as many to either
// side as its bits can count beside the escape.
VERICACHE_BOTH inline ResidualField rotated_field(float base, float reach) {
  const uint32_t range = rotated_range(base, reach);
  const uint32_t top = range >> 16;
  const uint32_t count = top - (range & 0xffffu) + 1;
  const int bits = residual_log2(count + 1);
  const bool either_sign = rotated_either_sign(base, reach);
  const bool negative = !either_sign && base < 0;
  if (bits > kOpenBits) {
    return {top, kOpenBits, either_sign, negative, true};
  }
  const uint32_t spare = (1u << bits) - 1 - count;
  return {top + spare / 2, bits, either_sign, negative, true};
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
    for (int token = 0; token < kPageTokens; ++token) {
      float* x = &base_[place(token, 0)];
      for (int dim = 0; dim < dims_; ++dim) {
        const Code at = code_at(token, dim);
        const float scale = float_of_bits(at.group.first << 16);
        // The product is exact: only the sum rounds.
        x[dim] = static_cast<float>(at.code) * scale + float_of_bits(at.group.second << 16);
        scales[static_cast<size_t>(keys ? dim : token)] = scale;
      }
      rotate(x, shape.head_dim);
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
      const int first = i / steps * steps;  // of the value's block
      reach_.push_back(i < rotated ? rotated_reach(rotation_sum(&squares[static_cast<size_t>(first)], steps), steps)
                                   : 0.5f * scales[static_cast<size_t>(i)]);
    }
  }

  size_t place(int token, int dim) const {
    return static_cast<size_t>(token) * static_cast<size_t>(dims_) + static_cast<size_t>(dim);
  }

  bool keys_;
  int dims_;
  std::vector<float> base_;   // (tokens, dims)
  std::vector<float> reach_;  // of K per dim, of V per token
};

}  // namespace vericache
