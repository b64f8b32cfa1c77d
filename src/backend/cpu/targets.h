// The Highway targets that are compiled, and the one that serves an instruction class. Include before
// hwy/foreach_target.h.
#pragma once

// One target per instruction class; without a baseline of SSE4 Highway's scalar target stays as the last resort of
// Isa::portable.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)

// Calls the function of this name in the namespace of the target that serves `isa`.
#define VERICACHE_FOR_ISA(isa, function)               \
  switch (isa) {                                       \
    case Isa::portable:                                \
      if ((hwy::SupportedTargets() & HWY_SSE4) != 0) { \
        return N_SSE4::function();                     \
      }                                                \
      break;                                           \
    case Isa::avx2:                                    \
      return N_AVX2::function();                       \
    case Isa::avx512:                                  \
    case Isa::avx512_bf16:                             \
    case Isa::amx:                                     \
      return N_AVX3::function();                       \
  }                                                    \
  return HWY_STATIC_DISPATCH(function)()
