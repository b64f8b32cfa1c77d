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
inline constexpr float kDeviationsAbove = 2.7f;
inline constexpr float kDeviationsBelow = 1.8f;

// By what the variance is more than the steps say. Keys that LDLQ rounds (KvFormat::ldlq) lie farther from their codes,
// 1.27 times the variance; of 8 bits the steps are so small that what bases lose in bf16 counts beside them. Fewest
// bits with these, or nearly so and fewer escapes.
VERICACHE_BOTH constexpr float rotated_spread(int bits, bool keys) {
  return bits == 8 ? (keys ? 2.0f : 1.4f) : keys && bits <= kMostLdlqBits ? 1.15f : 1.0f;
}

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
  const int needed = residual_log2(high - low + 2);
  const int bits = needed < kLikelyBits ? needed : kLikelyBits;
  return {high + 1, bits - (either_sign ? 1 : 0), either_sign, !either_sign && base >> 15 != 0, true};
}

// A base is made of what a token's codes say beside their middle, in bf16: every sum and product is rounded to it. What
// the middles say is the same for all tokens of K, and of V in the first dim of each block alone; there floats do it.
VERICACHE_BOTH constexpr float rotated_middle(int bits) {
  return static_cast<float>(1 << (bits - 1));
}
VERICACHE_BOTH inline float rotated_centre(float scale, float minimum, int bits) {
  return minimum + rotated_middle(bits) * scale;  // the product is exact
}
// Of rotation_scale() what is left beside rotation_power(), by which a bf16 is scaled as it is.
VERICACHE_BOTH constexpr float rotated_rest(int block) {
  return rotation_scale(block) == rotation_power(block) ? 1.0f : 0.70703125f;  // the nearest bf16
}
// What the rotation of equal values gives in the first dim of a block, of each.
VERICACHE_BOTH constexpr float rotated_constant(int block) {
  return 1.0f / rotation_scale(block);
}

// Bases and reaches of a packed K or V part of a head page, whose codes are affine. Channels that only fill a key up to
// key_dim() are not rotated: there the base is what the code stands for.
class RotatedBase {
 public:
  struct Code {
    uint32_t code = 0;
    ResidualGroup group;
  };
  // code_at(token, dim): the Code there; asked for every token and dim. bits: of a code.
  template <typename CodeAt>
  RotatedBase(const KvShape& shape, bool keys, int bits, const CodeAt& code_at)
      : keys_(keys),
        head_dim_(shape.head_dim),
        dims_(keys ? shape.key_dim() : shape.head_dim),
        base_(static_cast<size_t>(kPageTokens * dims_)) {
    const Groups groups = groups_of(bits, code_at);
    std::vector<float> x(static_cast<size_t>(dims_));
    for (int token = 0; token < kPageTokens; ++token) {
      const auto code_less_middle = [&](int dim) {
        return static_cast<float>(code_at(token, dim).code) - rotated_middle(bits);
      };
      keys ? make_keys(groups, code_less_middle, x) : make_values(groups, token, code_less_middle, x);
      for (int dim = 0; dim < dims_; ++dim) {
        base_[place(token, dim)] = bits_of(x[static_cast<size_t>(dim)]);
      }
    }
  }
  ResidualField field(int token, int dim) const {
    return rotated_field(base_[place(token, dim)], reach_[static_cast<size_t>(keys_ ? dim : token)]);
  }

 private:
  // Of K per dim, of V per token.
  struct Groups {
    std::vector<float> scales;
    std::vector<float> centres;
  };

  // A float holds the sum or the product of two bf16 so nearly that rounding it rounds the exact one.
  static uint16_t bits_of(float x) { return static_cast<uint16_t>(residual_round(x, 0.0f)); }
  static float round(float x) { return float_of_bits(uint32_t{bits_of(x)} << 16); }

  template <typename CodeAt>
  Groups groups_of(int bits, const CodeAt& code_at) {
    Groups groups;
    std::vector<float> squares;
    const int count = keys_ ? dims_ : kPageTokens;
    for (int i = 0; i < count; ++i) {
      const ResidualGroup group = code_at(keys_ ? 0 : i, keys_ ? i : 0).group;
      const float scale = float_of_bits(group.first << 16);
      groups.scales.push_back(scale);
      groups.centres.push_back(rotated_centre(scale, float_of_bits(group.second << 16), bits));
      squares.push_back(scale * scale);
    }
    const int block = rotation_block(head_dim_);
    for (int i = 0; i < count; ++i) {
      const bool mixed = keys_ && i < head_dim_;
      const int first = mixed ? i / block * block : i;
      const int steps = mixed ? block : 1;
      const float sum = rotation_sum(&squares[static_cast<size_t>(first)], steps);
      reach_.push_back(rotated_reach(rotated_spread(bits, keys_) * sum, steps));
    }
    if (keys_) {
      rotate(groups.centres.data(), head_dim_);
    }
    return groups;
  }

  template <typename CodeLessMiddle>
  void make_keys(const Groups& groups, const CodeLessMiddle& code, std::vector<float>& x) const {
    const int block = rotation_block(head_dim_);
    for (int dim = 0; dim < dims_; ++dim) {
      const auto i = static_cast<size_t>(dim);
      x[i] = round(code(dim) * (dim < head_dim_ ? round(groups.scales[i] * rotated_rest(block)) : groups.scales[i]));
    }
    rotation_sums(x.data(), head_dim_, round);
    for (int dim = 0; dim < dims_; ++dim) {
      const auto i = static_cast<size_t>(dim);
      x[i] = x[i] * (dim < head_dim_ ? rotation_power(block) : 1.0f) + round(groups.centres[i]);
    }
  }
  template <typename CodeLessMiddle>
  void make_values(const Groups& groups, int token, const CodeLessMiddle& code, std::vector<float>& x) const {
    const int block = rotation_block(head_dim_);
    for (int dim = 0; dim < dims_; ++dim) {
      x[static_cast<size_t>(dim)] = code(dim);
    }
    rotation_sums(x.data(), head_dim_, round);
    const float scale =
        round(round(groups.scales[static_cast<size_t>(token)] * rotated_rest(block)) * rotation_power(block));
    const float centre = round(groups.centres[static_cast<size_t>(token)] * rotated_constant(block));
    for (int dim = 0; dim < dims_; ++dim) {
      float& value = x[static_cast<size_t>(dim)];
      value = round(value * scale);
      value = dim % block == 0 ? value + centre : value;
    }
  }

  size_t place(int token, int dim) const {
    return static_cast<size_t>(token) * static_cast<size_t>(dims_) + static_cast<size_t>(dim);
  }

  bool keys_;
  int head_dim_;
  int dims_;
  std::vector<uint16_t> base_;       // bf16 (tokens, dims)
  std::vector<RotatedReach> reach_;  // of K per dim, of V per token
};

}  // namespace vericache
