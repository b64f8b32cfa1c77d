// SnapKV (Li et al. 2024, section 4): the attention mass that the last queries spend on each token, pooled over
// neighbours, per head. Chosen at the prompt's end and, because verification sees the full KV, again after every round.
#pragma once

#include "compress/scoring.h"

namespace vericache {

struct SnapKvOptions {
  Budget budget;
  int window = 32;  // queries that vote; as many of the last tokens are always kept
  int kernel = 7;   // tokens pooled (mean), odd
};

class SnapKv : public ScoringCompressor {
 public:
  SnapKv(const SnapKvOptions& options, const KvFormat& format) : ScoringCompressor(format), options_(options) {}
  std::string name() const override;
  int query_window() const override { return options_.window; }
  int kept_tokens(int tokens) const override { return options_.budget.tokens_of(tokens); }
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 protected:
  size_t own_scratch_bytes(int max_tokens, const KvShape& shape) const override;

  SnapKvOptions options_;
};

}  // namespace vericache
