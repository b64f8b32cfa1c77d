#include "compress/scoring.h"

namespace vericache {
namespace {

size_t score_bytes(int tokens, const KvShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(tokens) * sizeof(float);
}

}  // namespace

size_t ScoringCompressor::scratch_bytes(int max_tokens, const KvShape& shape) const {
  return score_bytes(max_tokens, shape);
}

std::byte* ScoringCompressor::scratch_behind_scores(int tokens, const KvShape& shape) const {
  return scratch() + score_bytes(tokens, shape);
}

void ScoringCompressor::choose(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, int* chosen,
                               int stride) {
  auto* scores = reinterpret_cast<float*>(scratch());
  score(kernels, full, tokens, seen, scores);
  kernels.choose_best(scores, full.shape.kv_heads, tokens, kept_tokens(tokens), chosen, stride);
}

}  // namespace vericache
