#include "compress/scoring.h"

namespace vericache {
namespace {

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}
size_t score_bytes(int tokens, const KvShape& shape) {
  return aligned(static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(tokens) * sizeof(float));
}

}  // namespace

MassArgs mass_args(const FullLayer& full, int tokens, const Attended& seen, float* mass, int stride) {
  return {.shape = full.shape,
          .heads = seen.heads,
          .scale = seen.scale,
          .queries = seen.queries,
          .rows = seen.rows,
          .position = seen.position,
          .kv = full.kv,
          .tokens = tokens,
          .mass = mass,
          .stride = stride};
}

void write_mass(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* mass) {
  kernels.attention_mass(mass_args(full, tokens, seen, mass, tokens));
}

// Counts of the heads, scores, what the method needs.
size_t ScoringCompressor::scratch_bytes(int max_tokens, const KvShape& shape) const {
  return count_bytes(shape) + score_bytes(max_tokens, shape) + aligned(own_scratch_bytes(max_tokens, shape));
}

float* ScoringCompressor::scores_in_scratch(const KvShape& shape) const {
  return reinterpret_cast<float*>(scratch() + count_bytes(shape));
}

std::byte* ScoringCompressor::own_scratch(int tokens, const KvShape& shape) const {
  return scratch() + count_bytes(shape) + score_bytes(tokens, shape);
}

void ScoringCompressor::choose(Kernels& kernels, const FullLayer& full, const Attended& seen, const Choice& choice) {
  float* scores = scores_in_scratch(full.shape);
  score(kernels, full, choice.tokens, seen, scores);
  keep_best(kernels, scores, full.shape, choice);
}

void ScoringCompressor::keep_best(Kernels& kernels, const float* scores, const KvShape& shape, const Choice& choice) {
  kernels.choose_best({.scores = scores,
                       .rows = shape.kv_heads,
                       .n = choice.tokens,
                       .count = choice.count,
                       .counts = choice.counts,
                       .chosen = choice.chosen,
                       .stride = choice.stride});
}

}  // namespace vericache
