#include "compress/keydiff.h"

#include <fmt/format.h>

namespace vericache {

std::string KeyDiff::name() const {
  return fmt::format("keydiff:budget={}{}", budget_.amount, format_suffix());
}

void KeyDiff::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& /*seen*/, float* scores) {
  kernels.key_scores({.shape = full.shape,
                      .kv = full.kv,
                      .tokens = tokens,
                      .measure = KeyMeasure::difference,
                      .scratch = reinterpret_cast<float*>(own_scratch(tokens, full.shape)),
                      .scores = scores});
}

}  // namespace vericache
