// KeyDiff (Park et al. 2025, section 3): tokens whose keys point elsewhere than the mean of all directions stay; no
// query is needed. Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/scoring.h"

namespace vericache {

class KeyDiff final : public ScoringCompressor {
 public:
  KeyDiff(const Budget& budget, const KvFormat& format) : ScoringCompressor(format), budget_(budget) {}
  std::string name() const override;
  int kept_tokens(int tokens) const override { return budget_.tokens_of(tokens); }
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override;

 protected:
  size_t own_scratch_bytes(int max_tokens, const KvShape& shape) const override {
    return key_score_floats(max_tokens, shape) * sizeof(float);
  }

 private:
  Budget budget_;
};

}  // namespace vericache
