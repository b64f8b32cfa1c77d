// Non-uniform codes of head pages, and their outliers, as nuq_codes.h says (KVQuant, Hooper et al. 2024).
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/nuq_ops.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "backend/cpu/codes-inl.h"
#include "backend/cpu/nuq_encoder.h"
#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"
#include "base/check.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace {

constexpr int kLanes = static_cast<int>(hn::MaxLanes(F32()));

template <typename Run>
void for_bits(int bits, const Run& run) {
  switch (bits) {
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    default:
      check(false, "non-uniform codes have 2, 3 or 4 bits");
  }
}

template <int kBits>
void write_rows(const NuqEncoder& encoder, const PartLayout& layout, std::byte* out) {
  for (int panel = 0; panel < layout.panels; ++panel) {
    for (int pair = 0; pair < layout.pairs; ++pair) {
      uint32_t codes[2][kPanel];
      for (int lane = 0; lane < kPanel; ++lane) {
        for (int e = 0; e < 2; ++e) {
          const int across = panel * kPanel + lane;
          const int along = 2 * pair + e;
          codes[e][lane] = layout.keys ? encoder.code(along, across) : encoder.code(across, along);
        }
      }
      write_codes<kBits>(codes, layout, panel * layout.pairs + pair, out);
    }
  }
}

void quantize(const bf16* source, const PartLayout& layout, int lane_limit, int value_limit,
              const HeadRounding& /*rounding*/, std::byte* out) {
  const NuqEncoder encoder(source, layout, layout.keys ? lane_limit : value_limit, out + layout.code_bytes());
  for_bits(layout.part.bits, [&]<int kBits>() { write_rows<kBits>(encoder, layout, out); });
}

// levels: of the codes, as floats.
HWY_INLINE Words decode(Words code, const float* levels, float scale, float minimum) {
  const F32 d;
  const auto index = hn::BitCast(I32(), code);
#if HWY_TARGET <= HWY_AVX3
  const Floats level = hn::TableLookupLanes(hn::Load(d, levels), hn::IndicesFromVec(d, index));
#else
  const Floats level = hn::GatherIndex(d, levels, index);
#endif
  return round_finite_to_bf16(hn::MulAdd(level, hn::Set(d, scale), hn::Set(d, minimum)));
}

template <int kBits>
void dequantize_rows(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next) {
  const NuqReader reader(source, layout);
  HWY_ALIGN float levels[kNuqLevels];
  for (int code = 0; code < kNuqLevels; ++code) {
    levels[code] = static_cast<float>(reader.levels()[code]);
  }
  for (int pair = 0; pair < layout.pairs; ++pair) {
    prefetch_share(next, layout.code_bytes() + reader.group_bytes(), layout.pairs, pair);
    const float scale[2] = {reader.scale(2 * pair), reader.scale(2 * pair + 1)};
    const float minimum[2] = {reader.minimum(2 * pair), reader.minimum(2 * pair + 1)};
    for (int panel = 0; panel < layout.panels; ++panel) {
      const int row = panel * layout.pairs + pair;
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        const CodePair codes = read_codes<kBits>(source, layout, row, lane);
        store_pairs(decode(codes.first, levels, scale[0], minimum[0]),
                    decode(codes.second, levels, scale[1], minimum[1]), out + (row * kPanel + lane) * 2);
      }
    }
  }
  reader.patch(out);
}

void dequantize(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next) {
  for_bits(layout.part.bits, [&]<int kBits>() { dequantize_rows<kBits>(source, layout, out, next); });
}

}  // namespace

const PartOps& nuq_table() {
  static constexpr PartOps kOps{quantize, dequantize};
  return kOps;
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vericache {

const PartOps& nuq_ops(Isa isa) {
  VERICACHE_FOR_ISA(isa, nuq_table);
}

}  // namespace vericache
#endif
