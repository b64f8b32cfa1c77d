// ScoringCompressor: a method that says how much each token is worth, per head; keeping the best is shared and lies
// here. Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/dropping.h"

namespace vericache {

class ScoringCompressor : public DroppingCompressor {
 public:
  size_t scratch_bytes(int max_tokens, const KvShape& shape) const override;

 protected:
  explicit ScoringCompressor(const KvFormat& format) : DroppingCompressor(format) {}
  // scores (kv_heads, tokens) of tokens [0, tokens), device memory: written. Higher is better, +inf is always kept, NaN
  // is worth nothing; ties fall to the later token.
  virtual void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) = 0;
  // A method's own scratch lies behind the scores.
  std::byte* scratch_behind_scores(int tokens, const KvShape& shape) const;

 private:
  void choose(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, int* chosen, int stride) final;
};

}  // namespace vericache
