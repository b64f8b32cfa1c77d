// Vector pieces that the SIMD files share: bf16 pairs, rounding, 2^x, loads of fewer lanes. Included once per Highway
// target.
#if defined(VERICACHE_VECTORS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef VERICACHE_VECTORS_INL
#undef VERICACHE_VECTORS_INL
#else
#define VERICACHE_VECTORS_INL
#endif

#include <hwy/highway.h>

#include <cstring>

#include "base/bf16.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, 16>;
using U32 = hn::RebindToUnsigned<F32>;
using I32 = hn::RebindToSigned<F32>;
using U16 = hn::Rebind<uint16_t, F32>;
using Floats = hn::Vec<F32>;
using Words = hn::Vec<U32>;

HWY_INLINE Floats first_of_pair(Words pair) {
  return hn::BitCast(F32(), hn::ShiftLeft<16>(pair));
}
HWY_INLINE Floats second_of_pair(Words pair) {
  return hn::BitCast(F32(), hn::And(pair, hn::Set(U32(), 0xffff0000u)));
}

// The float's bits after rounding to bf16 (nearest, ties to even), in the upper half; the lower half is not cleared.
// For finite x.
HWY_INLINE Words round_finite_to_bf16(Floats x) {
  const Words bits = hn::BitCast(U32(), x);
  const Words odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(U32(), 1));
  return hn::Add(hn::Add(bits, hn::Set(U32(), 0x7fff)), odd);
}

// The same for every x: NaN stays NaN.
HWY_INLINE Words round_to_bf16(Floats x) {
  const Words quiet = hn::Or(hn::BitCast(U32(), x), hn::Set(U32(), 0x400000));
  return hn::IfThenElse(hn::RebindMask(U32(), hn::IsNaN(x)), quiet, round_finite_to_bf16(x));
}

HWY_INLINE hn::Vec<U16> demote_to_bf16(Floats x) {
  return hn::TruncateTo(U16(), hn::ShiftRight<16>(round_to_bf16(x)));
}

// Loads and stores of n lanes; n may exceed the vector, and lanes from n on are zero. Remainders run through the same
// vector code.
HWY_INLINE Floats load_lanes(const float* p, size_t n) {
  if (n >= hn::Lanes(F32())) {
    return hn::LoadU(F32(), p);
  }
  HWY_ALIGN float lanes[16] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return hn::Load(F32(), lanes);
}
HWY_INLINE void store_lanes(Floats v, float* p, size_t n) {
  if (n >= hn::Lanes(F32())) {
    hn::StoreU(v, F32(), p);
    return;
  }
  HWY_ALIGN float lanes[16];
  hn::Store(v, F32(), lanes);
  std::memcpy(p, lanes, n * sizeof(float));
}
HWY_INLINE void store_lanes(hn::Vec<U16> v, bf16* p, size_t n) {
  if (n >= hn::Lanes(F32())) {
    hn::StoreU(v, U16(), reinterpret_cast<uint16_t*>(p));
    return;
  }
  HWY_ALIGN uint16_t lanes[16];
  hn::Store(v, U16(), lanes);
  std::memcpy(p, lanes, n * sizeof(bf16));
}

// 2^x for x <= 127; below -126.5 exactly 0, at 0 exactly 1. Relative error 1e-7: 2^x = 2^n 2^r, a polynomial in r on
// [-1/2, 1/2].
HWY_INLINE Floats exp2(Floats x) {
  const F32 d;
  // Adding 1.5 * 2^23 rounds x to an integer and leaves it in the low bits; 127 makes it the exponent field of 2^n.
  const Floats magic = hn::Set(d, 12582912.0f + 127.0f);
  const Floats clamped = hn::Max(x, hn::Set(d, -127.0f));
  const Floats shifted = hn::Add(clamped, magic);
  const Floats r = hn::Sub(clamped, hn::Sub(shifted, magic));
  Floats p = hn::Set(d, 0.00132647273f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.00967151299f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.0555073358f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.240222424f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.693147004f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  return hn::Mul(p, hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(U32(), shifted))));
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
