// KVzip (Kim et al. 2025, section 3): a token is worth the largest attention weight that it gets while the model
// repeats the context: the maximum over all repeated rows and over the query heads that share its KV head, the softmax
// running over context and repeated rows. Whatever is asked later, the choice is the same. The maxima live in the notes
// of each sequence and layer; the replay costs about a second prefill. The paper keeps every token behind the context;
// here memory is reserved for a share of the whole, so that the last tokens of those that no replay has weighed are
// kept, up to half of what a head keeps, and older ones of them go first. Called from the engine's thread, as
// compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

class KvZip final : public ScoringCompressor {
 public:
  KvZip(const Budget& budget, const KvFormat& format) : ScoringCompressor(format), budget_(budget) {}
  std::string name() const override;
  bool reconstructs() const override { return true; }
  size_t notes_bytes(int max_tokens, const KvShape& shape) const override;
  int kept_tokens(int tokens) const override { return budget_.tokens_of(tokens); }
  void reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) override;
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 private:
  Budget budget_;
};

}  // namespace vericache
