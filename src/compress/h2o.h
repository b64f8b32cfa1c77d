// H2O (Zhang et al. 2023, section 4): the heavy hitters, tokens with the most attention from all queries so far, fill
// half of the budget, the last tokens the other half. The sums live in the notes of each sequence and layer and grow
// with every query of a decided token: as many products again as attention's own during prefill. Of drafts that were
// accepted, the last kRing queries count. Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

class H2o final : public ScoringCompressor {
 public:
  H2o(const Budget& budget, const KvFormat& format) : ScoringCompressor(format), budget_(budget) {}
  std::string name() const override;
  int query_window() const override { return kRing; }
  bool observes() const override { return true; }
  size_t notes_bytes(int max_tokens, const KvShape& shape) const override;
  int kept_tokens(int tokens) const override { return budget_.tokens_of(tokens); }
  void observe(Kernels& kernels, const FullLayer& full, const Attended& seen) override;
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 private:
  static constexpr int kRing = 128;  // queries of a verification, until it is known which stand

  Budget budget_;
};

}  // namespace vericache
