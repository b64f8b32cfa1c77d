// StreamingLLM (Xiao et al. 2024, section 3): the first tokens ("sinks") and the last ones are kept, the middle is
// dropped. Called from the engine's thread, as compressor.h says.
#pragma once

#include <vector>

#include "compress/dropping.h"

namespace vericache {

class StreamingLlm final : public DroppingCompressor {
 public:
  // window: how many of the last folded tokens, a share of the context (at most 1) or a count.
  StreamingLlm(int sinks, double window, const KvFormat& format)
      : DroppingCompressor(format), sinks_(sinks), window_(window) {}
  std::string name() const override;
  int kept_tokens(int tokens) const override;

 private:
  void choose(Kernels& kernels, const FullLayer& full, const Attended& seen, const Choice& choice) override;

  int sinks_;
  double window_;
  std::vector<int> kept_;  // grows to what a head of the longest context keeps
};

}  // namespace vericache
