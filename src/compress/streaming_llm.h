// StreamingLLM (Xiao et al. 2024, section 3): the first tokens ("sinks") and the last ones are kept, the middle is
// dropped. Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

class StreamingLlm final : public ScoringCompressor {
 public:
  // window: how many of the last folded tokens, a share of the context (at most 1) or a count.
  StreamingLlm(int sinks, double window, const KvFormat& format)
      : ScoringCompressor(format), sinks_(sinks), window_(window) {}
  std::string name() const override;
  int kept_tokens(int tokens) const override;

 private:
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen,
             std::span<float> scores) override;

  int sinks_;
  double window_;
};

}  // namespace vericache
