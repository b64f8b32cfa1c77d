// Expected Attention (Devoto et al. 2025, section 3): the attention that queries to come will pay to a token, in closed
// form from the mean and the covariance of queries before RoPE and the mean rotation of the positions to come, times
// the length of its value. The statistics are those of the last `window` queries, as the paper keeps them while
// decoding. Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

struct ExpectedAttentionOptions {
  Budget budget;
  int window = 128;
  int future = 512;  // positions to come
  int sinks = 4;     // first tokens, always kept and left out of the softmax
};

class ExpectedAttention final : public ScoringCompressor {
 public:
  ExpectedAttention(const ExpectedAttentionOptions& options, const KvFormat& format)
      : ScoringCompressor(format), options_(options) {}
  std::string name() const override;
  int query_window() const override { return options_.window; }
  int kept_tokens(int tokens) const override { return options_.budget.tokens_of(tokens); }
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 protected:
  size_t own_scratch_bytes(int max_tokens, const KvShape& shape) const override {
    return expected_bytes(options_.window, max_tokens, shape);
  }

 private:
  ExpectedAttentionOptions options_;
};

}  // namespace vericache
