// ScoringCompressor: a method that says how much each token is worth, per head; keeping the best is shared and lies
// here. Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/dropping.h"

namespace vericache {

// What the queries that were seen give the first `tokens` tokens of the layer, into mass (kv_heads, stride).
MassArgs mass_args(const FullLayer& full, int tokens, const Attended& seen, float* mass, int stride);
// Attention mass of tokens [0, tokens) under the queries that were seen: mass (kv_heads, tokens), device memory.
void write_mass(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* mass);

class ScoringCompressor : public DroppingCompressor {
 public:
  // As much as the scores need, and own_scratch_bytes().
  size_t scratch_bytes(int max_tokens, const KvShape& shape) const override;
  // scores (kv_heads, tokens) of tokens [0, tokens), device memory: written. Higher is better, +inf is always kept, NaN
  // is worth nothing; ties fall to the later token.
  virtual void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) = 0;

 protected:
  explicit ScoringCompressor(const KvFormat& format) : DroppingCompressor(format) {}
  // Memory that score() works in, beside the scores.
  virtual size_t own_scratch_bytes(int max_tokens, const KvShape& shape) const {
    (void)max_tokens;
    (void)shape;
    return 0;
  }
  std::byte* own_scratch(int tokens, const KvShape& shape) const;
  float* scores_in_scratch(const KvShape& shape) const;
  void choose(Kernels& kernels, const FullLayer& full, const Attended& seen, const Choice& choice) override;
  static void keep_best(Kernels& kernels, const float* scores, const KvShape& shape, const Choice& choice);
};

}  // namespace vericache
