// KNorm (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", section 3): keys
// of small length draw attention, so those stay. The paper spares the first layers: ";layers=0-1:none". Called from the
// engine's thread, as compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

class KNorm final : public ScoringCompressor {
 public:
  KNorm(const Budget& budget, const KvFormat& format) : ScoringCompressor(format), budget_(budget) {}
  std::string name() const override;
  int kept_tokens(int tokens) const override { return budget_.tokens_of(tokens); }
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 private:
  Budget budget_;
};

}  // namespace vericache
