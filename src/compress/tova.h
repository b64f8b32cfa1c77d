// TOVA (Oren et al. 2024, section 3.2): what the last query attends to stays, the mean over all heads of a layer, so
// that all of them keep the same tokens. The last query here is the last row of the pass, which may be a draft's.
// Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

class Tova final : public ScoringCompressor {
 public:
  Tova(const Budget& budget, const KvFormat& format) : ScoringCompressor(format), budget_(budget) {}
  std::string name() const override;
  int query_window() const override { return 1; }
  int kept_tokens(int tokens) const override { return budget_.tokens_of(tokens); }
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 private:
  Budget budget_;
};

}  // namespace vericache
