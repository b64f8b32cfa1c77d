// Confidence: how likely a draft is to stand, from how far its runner-up stood behind it (the margin of choose(),
// backend/sampling.h). A compressed cache moves logits a little: where two tokens are close it often changes the
// choice, where one is far ahead hardly ever. What "close" means is learned from verifications. Pure; one per engine,
// used by its thread.
#pragma once

#include <array>
#include <cstddef>

namespace vericache {

class Confidence {
 public:
  // The chance that a draft of this margin (0 or more, in logits) is what the full cache chooses, if those before it
  // were.
  double stands(float margin) const;
  // A verification judged such a draft.
  void report(float margin, bool stood);

 private:
  // Bins of margins end here; the last one has no end.
  static constexpr std::array<float, 7> kEnds = {0.125f, 0.25f, 0.5f, 1, 2, 4, 8};
  static size_t bin_of(float margin);
  struct Bin {
    double stood = 0;  // decayed counts
    double refused = 0;
  };
  std::array<Bin, kEnds.size() + 1> bins_{};
};

}  // namespace vericache
