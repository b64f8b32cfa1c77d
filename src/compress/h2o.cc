#include "compress/h2o.h"

#include <fmt/format.h>

namespace vericache {

std::string H2o::name() const {
  return fmt::format("h2o:budget={}{}", budget_.amount, format_suffix());
}

// The mass of each token so far: (kv_heads, max_tokens).
size_t H2o::notes_bytes(int max_tokens, const KvShape& shape) const {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(max_tokens) * sizeof(float);
}

void H2o::observe(Kernels& kernels, const FullLayer& full, const Attended& seen) {
  MassArgs args = mass_args(full, seen.position + seen.rows, seen, reinterpret_cast<float*>(seen.notes.device),
                            seen.notes.max_tokens);
  args.added = seen.notes.observed;
  kernels.attention_mass(args);
}

void H2o::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) {
  check(seen.notes.observed >= tokens, "every token that may be kept was observed");
  const int recent = kept_tokens(tokens) / 2;
  const auto* mass = reinterpret_cast<const float*>(seen.notes.device);
  for (int head = 0; head < full.shape.kv_heads; ++head) {
    kernels.pool_mass(mass + static_cast<ptrdiff_t>(head) * seen.notes.max_tokens, 1, tokens, 0, recent,
                      scores + static_cast<ptrdiff_t>(head) * tokens);
  }
}

}  // namespace vericache
