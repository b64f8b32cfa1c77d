// Codes of any number of bits in the planes of kv_view.h: reading and writing those of a panel row. Included once per
// Highway target.
#if defined(VERICACHE_CODES_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef VERICACHE_CODES_INL
#undef VERICACHE_CODES_INL
#else
#define VERICACHE_CODES_INL
#endif

#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {

// Codes of the first and of the second value of some lanes' pairs.
struct CodePair {
  Words first;
  Words second;
};

// One word per lane of row `row` from `lane` on: a pair of `width` bits each, the first in the low bits.
HWY_INLINE Words read_plane(const std::byte* plane, int width, int row, int lane) {
  const std::byte* at = plane + row_offset(width, row);
  if (width == 8) {
    return hn::PromoteTo(U32(), hn::LoadU(U16(), reinterpret_cast<const uint16_t*>(at + 2 * lane)));
  }
  const hn::Rebind<uint8_t, F32> d8;
  const Words bytes = hn::PromoteTo(U32(), hn::LoadU(d8, reinterpret_cast<const uint8_t*>(at + lane)));
  return hn::ShiftRightSame(bytes, row_shift(width, row));
}

template <int kBits, int kWidth>
HWY_INLINE void append_plane(const std::byte* codes, const PartLayout& layout, int row, int lane, CodePair& out) {
  if constexpr ((kBits & kWidth) != 0) {
    const U32 du;
    const Words pair = read_plane(codes + plane_offset(layout, kWidth), kWidth, row, lane);
    const Words mask = hn::Set(du, (1u << kWidth) - 1);
    const Words first = hn::And(pair, mask);
    const Words second = hn::And(hn::ShiftRight<kWidth>(pair), mask);
    if constexpr (kBits >= 2 * kWidth) {
      out.first = hn::Or(hn::ShiftLeft<kWidth>(out.first), first);
      out.second = hn::Or(hn::ShiftLeft<kWidth>(out.second), second);
    } else {
      out = {first, second};
    }
  }
}
// kBits: of the layout's part.
template <int kBits>
HWY_INLINE CodePair read_codes(const std::byte* codes, const PartLayout& layout, int row, int lane) {
  CodePair out{hn::Zero(U32()), hn::Zero(U32())};
  append_plane<kBits, 8>(codes, layout, row, lane, out);
  append_plane<kBits, 4>(codes, layout, row, lane, out);
  append_plane<kBits, 2>(codes, layout, row, lane, out);
  append_plane<kBits, 1>(codes, layout, row, lane, out);
  return out;
}

template <int kBits, int kWidth>
inline void write_plane(const uint32_t (&codes)[2][kPanel], const PartLayout& layout, int row, std::byte* out) {
  if constexpr ((kBits & kWidth) != 0) {
    constexpr int kLeft = kBits & (kWidth - 1);  // bits of narrower planes
    constexpr uint32_t kMask = (1u << kWidth) - 1;
    auto* target = reinterpret_cast<uint8_t*>(out + plane_offset(layout, kWidth) + row_offset(kWidth, row));
    const int shift = row_shift(kWidth, row);
    const uint32_t kept = ~(((1u << 2 * kWidth) - 1) << shift);  // of the rows that share the byte
    for (int lane = 0; lane < kPanel; ++lane) {
      const uint32_t first = codes[0][lane] >> kLeft & kMask;
      const uint32_t second = codes[1][lane] >> kLeft & kMask;
      if constexpr (kWidth == 8) {
        target[2 * lane] = static_cast<uint8_t>(first);
        target[2 * lane + 1] = static_cast<uint8_t>(second);
      } else {
        target[lane] = static_cast<uint8_t>((first | second << kWidth) << shift | (target[lane] & kept));
      }
    }
  }
}
// codes: of the first and of the second values of a row.
template <int kBits>
inline void write_codes(const uint32_t (&codes)[2][kPanel], const PartLayout& layout, int row, std::byte* out) {
  write_plane<kBits, 8>(codes, layout, row, out);
  write_plane<kBits, 4>(codes, layout, row, out);
  write_plane<kBits, 2>(codes, layout, row, out);
  write_plane<kBits, 1>(codes, layout, row, out);
}

// The upper halves of two words per lane, as pairs of bf16.
HWY_INLINE void store_pairs(Words first, Words second, bf16* out) {
  const U32 du;
  const Words both = hn::Or(hn::ShiftRight<16>(first), hn::And(second, hn::Set(du, 0xffff0000u)));
  hn::StoreU(both, du, reinterpret_cast<uint32_t*>(out));
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
