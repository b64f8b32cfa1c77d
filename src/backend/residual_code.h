// What a bf16 value's resident code leaves open, as bits: the arithmetic of the exact residuals. Host and device code;
// pure.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "backend/nuq_codes.h"
#include "base/host_device.h"

namespace vericache {

// How the full KV crosses the wire and lies outside the device.
enum class ResidualCode {
  plain,     // bf16 pages as they are
  lossless,  // coded by itself: for pages whose resident part does not stand page for page, or is absent
  resident   // coded as what the resident page of the same tokens lacks
};

// Whether the rows of K (keys) or V are lossless ones. What a rotated format holds as bf16 was rounded after it was
// rotated: it has not the values, and no codes that leave something open.
VERICACHE_BOTH inline bool coded_alone(ResidualCode code, const KvFormat& format, bool keys) {
  return code == ResidualCode::lossless || (format.rotated && (keys ? format.key() : format.value()).exact());
}

// An encoded page, all of it in units of 16 bytes:
//   uint32 (kv_heads), padded to a unit: where each head's block ends, in units from the page's beginning;
//   the blocks of the heads.
// A block, of K and then V of a head page, in halves of 2 bytes: uint16 (rows): where each row ends, in halves from the
// block's beginning; the rows; zeros up to a unit.
// A row holds 256 values that lie one after the other in the bf16 head page: the lanes of a warp, 8 values each. It is
// the values themselves if it has 256 halves, and nothing if the resident part has them as they are. Else:
//   lossless only: a half that holds the row's base exponent;
//   the fields of the values, one behind the other from the lowest bit on, padded to a half;
//   what escaped: the values (16 bits), the first of each lane, then the second ones and so on; of a lossless row the
//   exponents (8 bits), in order, padded to a half.
// No field depends on another, so that all lanes of a row and all rows are read at once.
inline constexpr int kRowValues = 256;
inline constexpr int kLaneValues = 8;
inline constexpr size_t kResidualUnit = 16;

VERICACHE_BOTH inline int residual_key_rows(const KvShape& shape) {
  return shape.key_dim() * kPageTokens / kRowValues;
}
VERICACHE_BOTH inline int residual_rows(const KvShape& shape) {
  return (shape.key_dim() + shape.head_dim) * kPageTokens / kRowValues;
}
VERICACHE_BOTH inline uint32_t residual_header_units(const KvShape& shape) {
  return (static_cast<uint32_t>(shape.kv_heads) + 3) / 4;
}
VERICACHE_BOTH inline uint32_t residual_units(uint32_t halves) {
  return (halves + 7) / 8;
}
// The most bytes that a page takes.
inline size_t residual_bound(const KvShape& shape) {
  const auto rows = static_cast<uint32_t>(residual_rows(shape));
  return (residual_header_units(shape) +
          static_cast<size_t>(shape.kv_heads) * residual_units(rows + rows * kRowValues)) *
         kResidualUnit;
}

// The values that a resident code may stand for: magnitudes (the low 15 bits of a bf16, in which its magnitude grows)
// from `top` down, of one sign or of both. Coded is top - magnitude; what is not in there escapes: where a range is
// likely as zero, else as all ones of kOpenBits bits, and no sign.
inline constexpr int kOpenBits = 9;
inline constexpr int kLikelyBits = 11;  // more, a sign among them: else much of what is near zero escapes
struct ResidualField {
  uint32_t top = 0x7fff;
  int magnitude_bits = 0;    // kOpenBits at most, or of a likely one kLikelyBits less the sign
  bool either_sign = false;  // then the sign is one bit more, below
  bool negative = false;     // else this is it
  bool likely = false;       // not certain, however few its bits
  VERICACHE_BOTH int bits() const { return magnitude_bits + (either_sign ? 1 : 0); }
  VERICACHE_BOTH bool open() const { return likely || magnitude_bits == kOpenBits; }
};

// Two floats to the nearest bf16, ties to even, the first in the low half. NaN gives 0x7fff.
VERICACHE_BOTH inline uint32_t residual_round(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  const auto round = [](float x) {
    const auto u = std::bit_cast<uint32_t>(x);
    return std::isnan(x) ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  };
  return round(first) | round(second) << 16;
#endif
}

// Smallest n with 2^n >= x, for 1 <= x <= 2^15.
VERICACHE_BOTH inline int residual_log2(uint32_t x) {
#ifdef __CUDA_ARCH__
  return 32 - __clz(static_cast<int>(x - 1));
#else
  return static_cast<int>(std::bit_width(x - 1));
#endif
}

// A value lies between minimum + first * scale and minimum + last * scale, where first and last have 9 significant bits
// at most. Near zero such an interval holds every small exponent: what is below a sixteenth of its far end escapes, so
// that no code leaves more than kOpenBits and a sign open. An end that is no number counts as one of the largest
// magnitude.
VERICACHE_BOTH inline ResidualField interval_field(float first, float last, float scale, float minimum) {
  // Products of 9 and 8 significant bits are exact: only the sums round, contracted or not.
  const float low = minimum + first * scale;
  const float high = minimum + last * scale;
  const uint32_t pair = residual_round(low, high);
  const uint32_t magnitude_low = pair & 0x7fffu;
  const uint32_t magnitude_high = pair >> 16 & 0x7fffu;
  ResidualField field;
  field.either_sign = ((pair << 16 ^ pair) >> 31) != 0;
  field.negative = pair >> 31 != 0;
  field.top = magnitude_low > magnitude_high ? magnitude_low : magnitude_high;
  const uint32_t nearer = magnitude_low < magnitude_high ? magnitude_low : magnitude_high;
  const int bits = residual_log2(field.top - (field.either_sign ? 0 : nearer) + 1);
  field.magnitude_bits = bits < kOpenBits ? bits : kOpenBits;
  return field;
}
// Affine codes: within half a step of minimum + code * scale.
VERICACHE_BOTH inline ResidualField affine_field(uint32_t code, float scale, float minimum) {
  const auto step = static_cast<float>(code);
  return interval_field(step - 0.5f, step + 0.5f, scale, minimum);
}

// An outlier is resident as it is: nothing is open.
VERICACHE_BOTH inline ResidualField outlier_field(uint32_t value) {
  ResidualField field;
  field.top = value & kMagnitudeBits;
  field.negative = value >> 15 != 0;
  return field;
}

// A code that stands for nothing in particular: the value itself follows.
VERICACHE_BOTH inline ResidualField escaping_field() {
  ResidualField field;
  field.top = 0;
  field.magnitude_bits = kOpenBits;
  return field;
}

// Planes hold a value's leading bits: the rest of its mantissa is open.
VERICACHE_BOTH inline ResidualField plane_field(uint32_t code, int bits, uint32_t base) {
  const PlaneBits plane = plane_bits(code, bits);
  if (plane.distance == 15) {
    return escaping_field();
  }
  ResidualField field;
  field.magnitude_bits = 12 - bits;
  field.top =
      ((base - plane.distance) << 7 | plane.mantissa << field.magnitude_bits) + ((1u << field.magnitude_bits) - 1);
  field.negative = plane.sign != 0;
  return field;
}

// fp8 rounds the magnitude to the nearest multiple of 16, ties to the even one.
VERICACHE_BOTH inline ResidualField fp8_field(uint32_t code, uint32_t base) {
  const PlaneBits plane = plane_bits(code, 8);
  if (plane.distance == 15) {
    return escaping_field();
  }
  const bool even = plane.mantissa % 2 == 0;
  ResidualField field;
  field.magnitude_bits = even ? 5 : 4;
  field.top = ((base - plane.distance) << 7 | plane.mantissa << 4) + (even ? 8 : 7);
  field.negative = plane.sign != 0;
  return field;
}

// What a code is read with: of affine ones and nuq the scale and the minimum, of int8 the scale, as bits of bf16; else
// the base.
struct ResidualGroup {
  uint32_t first = 0;
  uint32_t second = 0;
  const uint8_t* levels = nullptr;  // of nuq
};
VERICACHE_BOTH inline ResidualField residual_field(const KvPart& part, uint32_t code, const ResidualGroup& group) {
  switch (part.code) {
    case KvCode::plane:
      return plane_field(code, part.bits, group.first);
    case KvCode::fp8:
      return fp8_field(code, group.first);
    case KvCode::int8: {
      const float scale = float_of_bits(group.first << 16);
      return affine_field(static_cast<uint32_t>(int8_of(code) + 128), scale, -128.0f * scale);
    }
    case KvCode::nuq:
      return interval_field(nuq_low(group.levels, code), nuq_high(group.levels, code, part.bits),
                            float_of_bits(group.first << 16), float_of_bits(group.second << 16));
    case KvCode::affine:
      break;
  }
  return affine_field(code, float_of_bits(group.first << 16), float_of_bits(group.second << 16));
}

struct CodedValue {
  uint32_t bits = 0;
  bool escapes = false;  // the value itself follows
  bool fits = true;      // false: the row stays as it is
};

VERICACHE_BOTH inline CodedValue code_value(const ResidualField& field, uint32_t value) {
  const uint32_t magnitude = value & 0x7fffu;
  const bool negative = value >> 15 != 0;
  const uint32_t ones = (1u << field.magnitude_bits) - 1;
  const uint32_t below = field.top - magnitude;
  const bool outside = field.likely ? below - 1 >= ones : below > (field.open() ? ones - 1 : ones);
  CodedValue coded;
  const bool escapes = outside || (!field.either_sign && negative != field.negative);
  coded.escapes = escapes && field.open();
  coded.fits = !escapes || field.open();
  coded.bits = !escapes ? below : field.likely ? 0 : ones;
  if (field.either_sign) {
    coded.bits = coded.bits << 1 | (negative && !escapes ? 1 : 0);
  }
  return coded;
}

VERICACHE_BOTH inline bool residual_escapes(const ResidualField& field, uint32_t bits) {
  const uint32_t below = bits >> (field.either_sign ? 1 : 0);
  return field.likely ? bits == 0 : field.open() && below == (1u << field.magnitude_bits) - 1;
}
// Any bits give a value; those of code_value give the one that was coded.
VERICACHE_BOTH inline uint32_t value_of(const ResidualField& field, uint32_t bits) {
  const uint32_t below = bits >> (field.either_sign ? 1 : 0);
  const bool negative = field.either_sign ? (bits & 1) != 0 : field.negative;
  return ((field.top - below) & 0x7fffu) | (negative ? 0x8000u : 0);
}

// Lossless: sign and mantissa, and how far the exponent lies below the row's base; 7 and more, or above it, escapes.
inline constexpr int kLosslessBits = 11;
inline constexpr uint32_t kLosslessEscape = 7;
// How far below the largest exponent of a row its base is looked for.
inline constexpr uint32_t kLosslessBases = 8;

VERICACHE_BOTH inline uint32_t exponent_of(uint32_t value) {
  return value >> 7 & 0xffu;
}
VERICACHE_BOTH inline CodedValue code_lossless(uint32_t base, uint32_t value) {
  const uint32_t below = base - exponent_of(value);  // above the base: huge
  CodedValue coded;
  coded.escapes = below >= kLosslessEscape;
  coded.bits = (value & 0x7fu) | (value >> 15) << 7 | (coded.escapes ? kLosslessEscape : below) << 8;
  return coded;
}
VERICACHE_BOTH inline uint32_t lossless_value(uint32_t bits, uint32_t exponent) {
  return (bits & 0x7fu) | (bits & 0x80u) << 8 | (exponent & 0xffu) << 7;
}

}  // namespace vericache
