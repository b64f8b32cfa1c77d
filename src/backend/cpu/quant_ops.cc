// Affine codes of 2 to 8 bits for head pages (KIVI, Liu et al. 2024): one scale and one minimum per value index of a
// pair.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/quant_ops.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <limits>
#include <vector>

#include "backend/cpu/codes-inl.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"
#include "base/check.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace {

constexpr int kLanes = static_cast<int>(hn::MaxLanes(F32()));

struct Affine {
  float scale = 0;
  float minimum = 0;
};

// Inputs that are not finite give codes of no meaning, and nothing worse: the result is only ever a draft.
Affine fit(float low, float high, int bits, std::byte* out) {
  const float steps = static_cast<float>((1 << bits) - 1);
  Affine affine;
  bf16 stored[2] = {};  // scale, minimum; the minimum of bf16 values is one of them, so it needs no rounding
  if (low <= high) {
    stored[0] = round_up_to_bf16((high - low) / steps);
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

HWY_INLINE Floats stands_for(Words code, const Affine& affine) {
  const F32 d;
  return hn::MulAdd(hn::ConvertTo(d, hn::BitCast(I32(), code)), hn::Set(d, affine.scale), hn::Set(d, affine.minimum));
}

// What the channels of a page's keys have lost to their codes so far, the last channel first.
class KeyErrors {
 public:
  explicit KeyErrors(const HeadRounding& rounding)
      : rounding_(rounding), errors_(static_cast<size_t>(rounding.dims) * kPageTokens) {}

  bool any(int dim) const { return dim < rounding_.dims; }
  // What a channel takes on of those behind it, tokens `token` and on.
  HWY_INLINE Floats taken(int dim, int token) const {
    const F32 d;
    Floats sum = hn::Zero(d);
    const bf16* shares = rounding_.matrix + dim * rounding_.dims;
    for (int from = dim + 1; from < rounding_.dims; ++from) {
      sum = hn::MulAdd(hn::LoadU(d, at(from, token)), hn::Set(d, to_float(shares[from])), sum);
    }
    return sum;
  }
  HWY_INLINE void put(int dim, int token, Floats error) { hn::StoreU(error, F32(), at(dim, token)); }

 private:
  const float* at(int dim, int token) const { return errors_.data() + dim * kPageTokens + token; }
  float* at(int dim, int token) { return errors_.data() + dim * kPageTokens + token; }

  HeadRounding rounding_;
  std::vector<float> errors_;  // (dims, tokens)
};

// errors: of the pairs behind this one; none where all is rounded to the nearest.
template <int kBits>
void quantize_pair(const bf16* source, const PartLayout& layout, int pair, int lane_limit, int value_limit,
                   KeyErrors& errors, std::byte* out) {
  const auto [part, panels, pairs, keys] = layout;
  constexpr int bits = kBits;
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
  std::byte* scales = out + layout.code_bytes();
  Affine affine[2];
  bool held[2];
  for (int e = 0; e < 2; ++e) {
    held[e] = 2 * pair + e < value_limit;
    const float bottom = held[e] ? hn::GetLane(hn::MinOfLanes(d, low[e])) : infinity;
    const float top = held[e] ? hn::GetLane(hn::MaxOfLanes(d, high[e])) : -infinity;
    affine[e] = fit(bottom, top, bits, scales + static_cast<size_t>(2 * pair + e) * 4);
  }
  for (int panel = 0; panel < panels; ++panel) {
    HWY_ALIGN uint32_t codes[2][kPanel];
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const auto mask = hn::RebindMask(U32(), present(panel, lane, lane_limit));
      const Words words = load(panel, lane);
      const Floats x[2] = {first_of_pair(words), second_of_pair(words)};
      for (int e = 1; e >= 0; --e) {
        const int value = 2 * pair + e;
        const int at = panel * kPanel + lane;
        Words code = hn::Zero(U32());
        if (errors.any(value)) {
          code = encode(hn::Add(x[e], errors.taken(value, at)), affine[e], bits);
          errors.put(value, at, hn::Sub(x[e], stands_for(code, affine[e])));
        } else if (held[e]) {
          code = encode(x[e], affine[e], bits);
        }
        hn::Store(hn::IfThenElseZero(mask, code), U32(), codes[e] + lane);
      }
    }
    write_codes<kBits>(codes, layout, panel * pairs + pair, out);
  }
}

// run(a value whose type tells the bits of affine codes)
template <int kBits>
struct Bits {
  static constexpr int kValue = kBits;
};
template <typename Run>
void for_bits(int bits, const Run& run) {
  switch (bits) {
    case 2:
      return run(Bits<2>());
    case 3:
      return run(Bits<3>());
    case 4:
      return run(Bits<4>());
    case 6:
      return run(Bits<6>());
    case 8:
      return run(Bits<8>());
    default:
      check(false, "affine codes have 2, 3, 4, 6 or 8 bits");
  }
}

void quantize(const bf16* source, const PartLayout& layout, int lane_limit, int value_limit,
              const HeadRounding& rounding, std::byte* out) {
  KeyErrors errors(rounding);
  for_bits(layout.part.bits, [&](auto bits) {
    for (int pair = layout.pairs - 1; pair >= 0; --pair) {
      quantize_pair<decltype(bits)::kValue>(source, layout, pair, lane_limit, value_limit, errors, out);
    }
  });
}

HWY_INLINE Words decode(Words code, const Affine& affine) {
  return round_finite_to_bf16(stands_for(code, affine));
}

template <int kBits>
void dequantize_bits(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next) {
  const std::byte* scales = source + layout.code_bytes();
  for (int pair = 0; pair < layout.pairs; ++pair) {
    prefetch_share(next, layout.code_bytes() + static_cast<size_t>(8 * layout.pairs), layout.pairs, pair);
    const Affine first = read_affine(scales, 2 * pair);
    const Affine second = read_affine(scales, 2 * pair + 1);
    for (int panel = 0; panel < layout.panels; ++panel) {
      const int row = panel * layout.pairs + pair;
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        const CodePair codes = read_codes<kBits>(source, layout, row, lane);
        store_pairs(decode(codes.first, first), decode(codes.second, second), out + (row * kPanel + lane) * 2);
      }
    }
  }
}

void dequantize(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next) {
#if HWY_TARGET == HWY_AVX3
  if (dequantize_by_table(source, layout.part.bits, layout.panels, layout.pairs, out, next)) {
    return;
  }
#endif
  for_bits(layout.part.bits, [&](auto bits) { dequantize_bits<decltype(bits)::kValue>(source, layout, out, next); });
}

}  // namespace

const PartOps& affine_table() {
  static constexpr PartOps kOps{quantize, dequantize};
  return kOps;
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vericache {

const PartOps& affine_ops(Isa isa) {
  VERICACHE_FOR_ISA(isa, affine_table);
}

}  // namespace vericache
#endif
