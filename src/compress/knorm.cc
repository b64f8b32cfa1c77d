#include "compress/knorm.h"

#include <fmt/format.h>

namespace vericache {

std::string KNorm::name() const {
  return fmt::format("knorm:budget={}{}", budget_.amount, format_suffix());
}

void KNorm::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& /*seen*/, float* scores) {
  kernels.key_scores(
      {.shape = full.shape, .kv = full.kv, .tokens = tokens, .measure = KeyMeasure::smallness, .scores = scores});
}

}  // namespace vericache
