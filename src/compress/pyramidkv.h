// PyramidKV (Cai et al. 2024, section 4): SnapKV's scores, but lower layers keep more and higher layers less, in even
// steps: the top one a `beta`-th of the mean (the window comes on top of that), the bottom one as much more than the
// mean as the top one less. What the bottom cannot hold of a share of the context, the top gets; the steps of a budget
// in tokens are those of a long context, so that no layer shrinks while it grows. Called from the engine's thread, as
// compressor.h says.
#pragma once

#include "compress/snapkv.h"

namespace vericache {

class PyramidKv final : public SnapKv {
 public:
  PyramidKv(const SnapKvOptions& options, double beta, const KvFormat& format) : SnapKv(options, format), beta_(beta) {}
  std::string name() const override;
  int kept_tokens(int tokens) const override;
  int head_tokens(int tokens, int layer, int layers) const override;

 private:
  double beta_;
};

}  // namespace vericache
