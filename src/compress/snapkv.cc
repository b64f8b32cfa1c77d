#include "compress/snapkv.h"

#include <fmt/format.h>

namespace vericache {

std::string SnapKv::name() const {
  return fmt::format("snapkv:budget={},window={},kernel={}{}", options_.budget.amount, options_.window, options_.kernel,
                     format_suffix());
}

// The scores, then as much mass.
size_t SnapKv::scratch_bytes(int max_tokens, const KvShape& shape) const {
  return 2 * ScoringCompressor::scratch_bytes(max_tokens, shape);
}

void SnapKv::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) {
  auto* mass = reinterpret_cast<float*>(scratch_behind_scores(tokens, full.shape));
  kernels.attention_mass({.shape = full.shape,
                          .heads = seen.heads,
                          .scale = seen.scale,
                          .queries = seen.queries,
                          .rows = seen.rows,
                          .position = seen.position,
                          .kv = full.kv,
                          .tokens = tokens,
                          .mass = mass});
  kernels.pool_mass(mass, full.shape.kv_heads, tokens, options_.kernel / 2, options_.window, scores);
}

}  // namespace vericache
