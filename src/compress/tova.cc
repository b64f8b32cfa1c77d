#include "compress/tova.h"

#include <fmt/format.h>

namespace vericache {

std::string Tova::name() const {
  return fmt::format("tova:budget={}{}", budget_.amount, format_suffix());
}

void Tova::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) {
  write_mass(kernels, full, tokens, seen.last(1), scores);
  kernels.mean_rows(scores, full.shape.kv_heads, tokens);
}

}  // namespace vericache
