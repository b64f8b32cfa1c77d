// Codes of resident KV that are read with something of their own token: planes, fp8 and int8, as kv_codes.h says.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/token_code_ops.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "backend/cpu/codes-inl.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"
#include "backend/kv_codes.h"
#include "base/check.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace {

constexpr int kLanes = static_cast<int>(hn::MaxLanes(F32()));

// One number per token of the page, as a vector for the lanes and the value `e` of a pair. `words`: aligned.
HWY_INLINE Words of_tokens(const uint32_t* words, const PartLayout& layout, int panel, int lane, int pair, int e) {
  return layout.keys ? hn::Load(U32(), words + panel * kPanel + lane) : hn::Set(U32(), words[2 * pair + e]);
}

// As kv_codes.h says of one value: those functions, on lanes.
HWY_INLINE Words finite_magnitude(Words value) {
  const U32 du;
  const Words magnitude = hn::And(value, hn::Set(du, kMagnitudeBits));
  return hn::IfThenElseZero(hn::Lt(magnitude, hn::Set(du, kSpecialExponent << 7)), magnitude);
}
HWY_INLINE Words round_to_fp8(Words magnitude) {
  const U32 du;
  const Words odd = hn::And(hn::ShiftRight<4>(magnitude), hn::Set(du, 1));
  const Words rounded = hn::Add(hn::Add(magnitude, hn::Set(du, 7)), odd);
  return hn::Min(hn::AndNot(hn::Set(du, 15), rounded), hn::Set(du, 0x7f70u));
}

HWY_INLINE Words plane_codes(Words value, Words base, const KvPart& part) {
  const U32 du;
  const int kept = part.bits - 5;
  const Words fifteen = hn::Set(du, 15);
  const Words raw = hn::And(value, hn::Set(du, kMagnitudeBits));
  const Words finite = finite_magnitude(value);
  const bool rounded = part.code == KvCode::fp8;
  const Words magnitude = rounded ? round_to_fp8(finite) : raw;
  // Of what is not finite the exponent is above the base: the difference wraps and is larger than any other.
  const Words exponent =
      hn::IfThenElse(hn::Eq(finite, raw), hn::ShiftRight<7>(magnitude), hn::Set(du, kSpecialExponent));
  const Words distance = hn::Sub(base, exponent);
  const Words rank = hn::Sub(fifteen, hn::Min(distance, fifteen));
  Words mantissa = hn::ShiftRightSame(hn::And(magnitude, hn::Set(du, 127)), 7 - kept);
  if (rounded) {
    mantissa = hn::IfThenElseZero(hn::Lt(distance, hn::Set(du, 16)), mantissa);
  }
  const Words sign = hn::ShiftLeftSame(hn::ShiftRight<15>(value), part.bits - 1);
  return hn::Or(hn::Or(sign, hn::ShiftLeftSame(rank, kept)), mantissa);
}
// The value in the upper half.
HWY_INLINE Words plane_values(Words code, Words base, const KvPart& part) {
  const U32 du;
  const int kept = part.bits - 5;
  const Words rank = hn::And(hn::ShiftRightSame(code, kept), hn::Set(du, 15));
  const Words exponent = hn::Add(hn::Min(base, hn::Set(du, kMostReadBase)), rank);
  const Words mantissa = hn::ShiftLeftSame(hn::And(code, hn::Set(du, (1u << kept) - 1)), 7 - kept + 16);
  const Words middle = hn::Set(du, part.code == KvCode::plane ? 1u << (6 - kept + 16) : 0);
  const Words fifteen = hn::Set(du, 15);
  const Words magnitude = hn::Or(hn::ShiftLeft<23>(hn::Sub(exponent, fifteen)), hn::Or(mantissa, middle));
  const Words sign = hn::ShiftLeft<31>(hn::ShiftRightSame(code, part.bits - 1));
  return hn::Or(sign, hn::IfThenElseZero(hn::Gt(exponent, hn::Set(du, 14)), magnitude));
}

HWY_INLINE Words int8_codes(Words value, Words inverse_scale) {
  const F32 d;
  const U32 du;
  const Words finite = finite_magnitude(value);
  const Floats most = hn::Set(d, 127.0f);
  const Floats steps = hn::Mul(hn::BitCast(d, hn::ShiftLeft<16>(finite)), hn::BitCast(d, inverse_scale));
  const hn::Vec<I32> magnitude = hn::NearestInt(hn::Min(steps, most));
  const auto negative = hn::Ne(hn::And(value, hn::Set(du, 0x8000u)), hn::Zero(du));
  const Words code = hn::BitCast(du, hn::IfThenElse(hn::RebindMask(I32(), negative), hn::Neg(magnitude), magnitude));
  return hn::And(code, hn::Set(du, 255));
}
HWY_INLINE Words int8_values(Words code, Words scale) {
  const F32 d;
  const hn::Vec<I32> whole = hn::ShiftRight<24>(hn::BitCast(I32(), hn::ShiftLeft<24>(code)));
  return round_finite_to_bf16(hn::Mul(hn::ConvertTo(d, whole), hn::BitCast(d, scale)));
}

// The largest magnitude of each token, among the values that are present and finite.
void measure(const bf16* source, const PartLayout& layout, int lane_limit, int value_limit, uint32_t* tops) {
  const U32 du;
  std::fill_n(tops, kPageTokens, 0u);
  for (int pair = 0; pair < layout.pairs; ++pair) {
    for (int panel = 0; panel < layout.panels; ++panel) {
      const bf16* row = source + static_cast<ptrdiff_t>(panel * layout.pairs + pair) * kPanel * 2;
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        const Words words = hn::LoadU(du, reinterpret_cast<const uint32_t*>(row + 2 * lane));
        Words magnitude[2] = {finite_magnitude(words), finite_magnitude(hn::ShiftRight<16>(words))};
        if (layout.part.code == KvCode::fp8) {
          magnitude[0] = round_to_fp8(magnitude[0]);
          magnitude[1] = round_to_fp8(magnitude[1]);
        }
        uint32_t* top = tops + (layout.keys ? panel * kPanel + lane : 2 * pair);
        if (layout.keys) {
          hn::Store(hn::Max(hn::Load(du, top), hn::Max(magnitude[0], magnitude[1])), du, top);
        } else {
          top[0] = std::max(top[0], hn::GetLane(hn::MaxOfLanes(du, magnitude[0])));
          top[1] = std::max(top[1], hn::GetLane(hn::MaxOfLanes(du, magnitude[1])));
        }
      }
    }
  }
  std::fill(tops + (layout.keys ? lane_limit : value_limit), tops + kPageTokens, 0u);
}

// Writes what the tokens' codes are read with, and turns tops into what they are made with: bases, or the inverse of
// the scale.
void fit(const PartLayout& layout, uint32_t* tops, std::byte* groups) {
  for (int token = 0; token < kPageTokens; ++token) {
    uint32_t& top = tops[token];
    if (layout.part.code != KvCode::int8) {
      top >>= 7;
      groups[token] = static_cast<std::byte>(top);
      continue;
    }
    const bf16 scale{static_cast<uint16_t>(int8_scale(top))};
    std::memcpy(groups + token * 2, &scale, sizeof(scale));
    top = scale.bits == 0 ? 0u : std::bit_cast<uint32_t>(1.0f / to_float(scale));
  }
}

template <int kBits, KvCode kCode>
void quantize_as(const bf16* source, const PartLayout& layout, int lane_limit, int value_limit, std::byte* out) {
  const U32 du;
  constexpr KvPart kPart{kBits, kCode};
  HWY_ALIGN uint32_t groups[kPageTokens];
  measure(source, layout, lane_limit, value_limit, groups);
  fit(layout, groups, out + layout.code_bytes());
  constexpr bool int8 = kCode == KvCode::int8;
  for (int pair = 0; pair < layout.pairs; ++pair) {
    for (int panel = 0; panel < layout.panels; ++panel) {
      const int row = panel * layout.pairs + pair;
      HWY_ALIGN uint32_t codes[2][kPanel];
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        const auto present = hn::Lt(hn::Iota(du, static_cast<uint32_t>(panel * kPanel + lane)),
                                    hn::Set(du, static_cast<uint32_t>(lane_limit)));
        const Words words = hn::LoadU(du, reinterpret_cast<const uint32_t*>(source + (row * kPanel + lane) * 2));
        const Words values[2] = {hn::And(words, hn::Set(du, 0xffffu)), hn::ShiftRight<16>(words)};
        for (int e = 0; e < 2; ++e) {
          const Words group = of_tokens(groups, layout, panel, lane, pair, e);
          const Words code = int8 ? int8_codes(values[e], group) : plane_codes(values[e], group, kPart);
          hn::Store(2 * pair + e < value_limit ? hn::IfThenElseZero(present, code) : hn::Zero(du), du, codes[e] + lane);
        }
      }
      write_codes<kBits>(codes, layout, row, out);
    }
  }
}

template <int kBits, KvCode kCode>
void dequantize_as(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next) {
  constexpr KvPart kPart{kBits, kCode};
  constexpr bool int8 = kCode == KvCode::int8;
  const std::byte* stored = source + layout.code_bytes();
  HWY_ALIGN uint32_t groups[kPageTokens];
  for (int token = 0; token < kPageTokens; ++token) {
    uint16_t scale = 0;
    if (int8) {
      std::memcpy(&scale, stored + 2 * token, sizeof(scale));
    }
    groups[token] = int8 ? uint32_t{scale} << 16 : std::to_integer<uint32_t>(stored[token]);
  }
  for (int pair = 0; pair < layout.pairs; ++pair) {
    prefetch_share(next, layout.code_bytes() + 2 * kPageTokens, layout.pairs, pair);
    for (int panel = 0; panel < layout.panels; ++panel) {
      const int row = panel * layout.pairs + pair;
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        const CodePair codes = read_codes<kBits>(source, layout, row, lane);
        const Words first = of_tokens(groups, layout, panel, lane, pair, 0);
        const Words second = of_tokens(groups, layout, panel, lane, pair, 1);
        bf16* target = out + (row * kPanel + lane) * 2;
        if (int8) {
          store_pairs(int8_values(codes.first, first), int8_values(codes.second, second), target);
        } else {
          store_pairs(plane_values(codes.first, first, kPart), plane_values(codes.second, second, kPart), target);
        }
      }
    }
  }
}

// Calls run<bits, code>() as the part says.
template <typename Run>
void for_part(const KvPart& part, const Run& run) {
  if (part.code == KvCode::int8) {
    return run.template operator()<8, KvCode::int8>();
  }
  if (part.code == KvCode::fp8) {
    return run.template operator()<8, KvCode::fp8>();
  }
  switch (part.bits) {
    case 6:
      return run.template operator()<6, KvCode::plane>();
    case 7:
      return run.template operator()<7, KvCode::plane>();
    case 8:
      return run.template operator()<8, KvCode::plane>();
    case 9:
      return run.template operator()<9, KvCode::plane>();
    default:
      check(false, "plane codes have 6, 7, 8 or 9 bits");
  }
}

void quantize(const bf16* source, const PartLayout& layout, int lane_limit, int value_limit,
              const HeadRounding& /*rounding*/, std::byte* out) {
  for_part(layout.part,
           [&]<int kBits, KvCode kCode>() { quantize_as<kBits, kCode>(source, layout, lane_limit, value_limit, out); });
}

void dequantize(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next) {
  for_part(layout.part, [&]<int kBits, KvCode kCode>() { dequantize_as<kBits, kCode>(source, layout, out, next); });
}

}  // namespace

const PartOps& token_code_table() {
  static constexpr PartOps kOps{quantize, dequantize};
  return kOps;
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vericache {

const PartOps& token_code_ops(Isa isa) {
  VERICACHE_FOR_ISA(isa, token_code_table);
}

}  // namespace vericache
#endif
