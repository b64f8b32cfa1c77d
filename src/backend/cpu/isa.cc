// Instruction classes: their names, and which of them this processor has.
#include <hwy/targets.h>

#include <algorithm>
#include <array>

#include "backend/cpu/cpu_kernels.h"
#include "backend/cpu/simd.h"

namespace vericache {
namespace {

constexpr std::array<std::string_view, 5> kIsaNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

}  // namespace

std::string_view isa_name(Isa isa) {
  return kIsaNames[static_cast<size_t>(isa)];
}

std::optional<Isa> parse_isa(std::string_view name) {
  const auto found = std::find(kIsaNames.begin(), kIsaNames.end(), name);
  return found == kIsaNames.end() ? std::nullopt : std::optional(static_cast<Isa>(found - kIsaNames.begin()));
}

bool isa_supported(Isa isa) {
  const int64_t targets = hwy::SupportedTargets();
  const bool avx512 = (targets & HWY_AVX3) != 0;
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return (targets & HWY_AVX2) != 0;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") != 0;
    case Isa::amx:
      return avx512 && __builtin_cpu_supports("amx-tile") != 0 && __builtin_cpu_supports("amx-bf16") != 0 &&
             amx_permitted();
  }
  return false;
}

Isa best_isa() {
  for (const Isa isa : {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
    if (isa_supported(isa)) {
      return isa;
    }
  }
  return Isa::portable;
}

}  // namespace vericache
