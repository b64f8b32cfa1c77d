#include "compress/snapkv.h"

#include <fmt/format.h>

namespace vericache {

std::string SnapKv::name() const {
  return fmt::format("snapkv:budget={},window={},kernel={}{}", options_.budget.amount, options_.window, options_.kernel,
                     format_suffix());
}

// The mass, before it is pooled.
size_t SnapKv::own_scratch_bytes(int max_tokens, const KvShape& shape) const {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(max_tokens) * sizeof(float);
}

void SnapKv::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) {
  auto* mass = reinterpret_cast<float*>(own_scratch(tokens, full.shape));
  write_mass(kernels, full, tokens, seen.last(options_.window), mass);
  kernels.pool_mass(mass, full.shape.kv_heads, tokens, options_.kernel / 2, options_.window, scores);
}

}  // namespace vericache
