// Affine codes of 2, 4 and 8 bits for head pages (KIVI, Liu et al. 2024): one scale and one minimum per value index of
// a pair.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/quant_ops.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <limits>

#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace {

constexpr int kLanes = static_cast<int>(hn::MaxLanes(F32()));

struct Affine {
  float scale = 0;
  float minimum = 0;
};

// Where the codes of panel row `row` begin; at 2 bits two rows share 16 bytes.
size_t code_offset(int bits, int row) {
  return bits == 8 ? static_cast<size_t>(row) * 32 : static_cast<size_t>(bits == 4 ? row : row / 2) * 16;
}

// The smallest bf16 that is not below x, for x >= 0; NaN stays NaN.
bf16 round_up(float x) {
  const bf16 below{static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)};
  return to_float(below) < x ? bf16{static_cast<uint16_t>(below.bits + 1)} : below;
}

// Inputs that are not finite give codes of no meaning, and nothing worse: the result is only ever a draft.
Affine fit(float low, float high, int bits, std::byte* out) {
  const float steps = static_cast<float>((1 << bits) - 1);
  Affine affine;
  bf16 stored[2] = {};  // scale, minimum; the minimum of bf16 values is one of them, so it needs no rounding
  if (low <= high) {
    stored[0] = round_up((high - low) / steps);
    stored[1] = to_bf16(low);
    affine = {to_float(stored[0]), to_float(stored[1])};
  }
  std::memcpy(out, stored, sizeof(stored));
  return affine;
}

Affine read_affine(const std::byte* scales, int value) {
  bf16 stored[2];
  std::memcpy(stored, scales + static_cast<size_t>(value) * sizeof(stored), sizeof(stored));
  return {to_float(stored[0]), to_float(stored[1])};
}

// Lanes of panel `panel` from `lane` on that are present.
HWY_INLINE auto present(int panel, int lane, int lane_limit) {
  return hn::RebindMask(F32(), hn::Lt(hn::Iota(I32(), panel * kPanel + lane), hn::Set(I32(), lane_limit)));
}

HWY_INLINE Words encode(Floats x, const Affine& affine, int bits) {
  const F32 d;
  const float inverse = affine.scale > 0 ? 1.0f / affine.scale : 0.0f;
  const Floats step = hn::Mul(hn::Sub(x, hn::Set(d, affine.minimum)), hn::Set(d, inverse));
  // Max before Min and the bound second: a NaN becomes the bound.
  const Floats clamped = hn::Min(hn::Max(step, hn::Zero(d)), hn::Set(d, static_cast<float>((1 << bits) - 1)));
  return hn::BitCast(U32(), hn::NearestInt(clamped));
}

void write_codes(const uint32_t* codes, int bits, int row, std::byte* out) {
  std::byte* target = out + code_offset(bits, row);
  for (int lane = 0; lane < kPanel; ++lane) {
    const uint32_t code = codes[lane];
    if (bits == 8) {
      target[2 * lane] = static_cast<std::byte>(code & 0xff);
      target[2 * lane + 1] = static_cast<std::byte>(code >> 8);
    } else if (bits == 4) {
      target[lane] = static_cast<std::byte>(code);
    } else if (row % 2 == 0) {
      target[lane] = static_cast<std::byte>(code);
    } else {
      target[lane] |= static_cast<std::byte>(code << 4);
    }
  }
}

void quantize_pair(const bf16* source, int bits, int panels, int pairs, int pair, int lane_limit, int value_limit,
                   std::byte* out) {
  const F32 d;
  const float infinity = std::numeric_limits<float>::infinity();
  Floats low[2] = {hn::Set(d, infinity), hn::Set(d, infinity)};
  Floats high[2] = {hn::Set(d, -infinity), hn::Set(d, -infinity)};
  const auto load = [&](int panel, int lane) HWY_ATTR {
    return hn::LoadU(U32(), reinterpret_cast<const uint32_t*>(source + ((panel * pairs + pair) * kPanel + lane) * 2));
  };
  for (int panel = 0; panel < panels; ++panel) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const auto mask = present(panel, lane, lane_limit);
      const Words words = load(panel, lane);
      const Floats x[2] = {first_of_pair(words), second_of_pair(words)};
      for (int e = 0; e < 2; ++e) {
        low[e] = hn::IfThenElse(mask, hn::Min(x[e], low[e]), low[e]);
        high[e] = hn::IfThenElse(mask, hn::Max(x[e], high[e]), high[e]);
      }
    }
  }
  std::byte* scales = out + code_bytes(bits, panels, pairs);
  Affine affine[2];
  bool held[2];
  for (int e = 0; e < 2; ++e) {
    held[e] = 2 * pair + e < value_limit;
    const float bottom = held[e] ? hn::GetLane(hn::MinOfLanes(d, low[e])) : infinity;
    const float top = held[e] ? hn::GetLane(hn::MaxOfLanes(d, high[e])) : -infinity;
    affine[e] = fit(bottom, top, bits, scales + static_cast<size_t>(2 * pair + e) * 4);
  }
  for (int panel = 0; panel < panels; ++panel) {
    HWY_ALIGN uint32_t codes[kPanel];
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const auto mask = hn::RebindMask(U32(), present(panel, lane, lane_limit));
      const Words words = load(panel, lane);
      const Words first = held[0] ? encode(first_of_pair(words), affine[0], bits) : hn::Zero(U32());
      const Words second = held[1] ? encode(second_of_pair(words), affine[1], bits) : hn::Zero(U32());
      const Words both = hn::Or(first, hn::ShiftLeftSame(second, bits));
      hn::Store(hn::IfThenElseZero(mask, both), U32(), codes + lane);
    }
    write_codes(codes, bits, panel * pairs + pair, out);
  }
}

void quantize(const bf16* source, int bits, int panels, int pairs, int lane_limit, int value_limit, std::byte* out) {
  for (int pair = 0; pair < pairs; ++pair) {
    quantize_pair(source, bits, panels, pairs, pair, lane_limit, value_limit, out);
  }
}

// Codes of `kLanes` lanes as one word each, the pair's first code in the low bits.
HWY_INLINE Words read_codes(const std::byte* source, int bits, int row, int lane) {
  const std::byte* at = source + code_offset(bits, row);
  if (bits == 8) {
    return hn::PromoteTo(U32(), hn::LoadU(U16(), reinterpret_cast<const uint16_t*>(at + 2 * lane)));
  }
  const hn::Rebind<uint8_t, F32> d8;
  const Words bytes = hn::PromoteTo(U32(), hn::LoadU(d8, reinterpret_cast<const uint8_t*>(at + lane)));
  return bits == 2 && row % 2 != 0 ? hn::ShiftRight<4>(bytes) : bytes;
}

HWY_INLINE Words decode(Words code, const Affine& affine) {
  const F32 d;
  const Floats step = hn::ConvertTo(d, hn::BitCast(I32(), code));
  return round_finite_to_bf16(hn::MulAdd(step, hn::Set(d, affine.scale), hn::Set(d, affine.minimum)));
}

void dequantize(const std::byte* source, int bits, int panels, int pairs, bf16* out, const std::byte* next) {
#if HWY_TARGET == HWY_AVX3
  if (dequantize_by_table(source, bits, panels, pairs, out, next)) {
    return;
  }
#endif
  const U32 du;
  const std::byte* scales = source + code_bytes(bits, panels, pairs);
  const Words mask = hn::Set(du, (1u << bits) - 1);
  for (int pair = 0; pair < pairs; ++pair) {
    prefetch_pair(next, bits, panels, pairs, pair);
    const Affine first = read_affine(scales, 2 * pair);
    const Affine second = read_affine(scales, 2 * pair + 1);
    for (int panel = 0; panel < panels; ++panel) {
      const int row = panel * pairs + pair;
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        const Words codes = read_codes(source, bits, row, lane);
        const Words low = hn::ShiftRight<16>(decode(hn::And(codes, mask), first));
        const Words high = decode(hn::And(hn::ShiftRightSame(codes, bits), mask), second);
        const Words both = hn::Or(low, hn::And(high, hn::Set(du, 0xffff0000u)));
        hn::StoreU(both, du, reinterpret_cast<uint32_t*>(out + (row * kPanel + lane) * 2));
      }
    }
  }
}

}  // namespace

const QuantOps& quant_table() {
  static constexpr QuantOps kOps{quantize, dequantize};
  return kOps;
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vericache {

const QuantOps& quant_ops(Isa isa) {
  VERICACHE_FOR_ISA(isa, quant_table);
}

}  // namespace vericache
#endif
