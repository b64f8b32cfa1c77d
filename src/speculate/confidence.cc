#include "speculate/confidence.h"

#include <algorithm>

#include "base/check.h"

namespace vericache {
namespace {

// What is believed of a bin before anything is seen, as so many judged drafts: those of a 4-bit cache.
constexpr double kPriorDrafts = 4;
constexpr std::array<double, 8> kPriorRefusals = {0.5, 0.45, 0.35, 0.25, 0.15, 0.05, 0.01, 0.002};
// A judged draft's weight falls to 1/e after about so many more of its bin.
constexpr double kMemoryDrafts = 500;

}  // namespace

size_t Confidence::bin_of(float margin) {
  return static_cast<size_t>(std::upper_bound(kEnds.begin(), kEnds.end(), margin) - kEnds.begin());
}

double Confidence::stands(float margin) const {
  const size_t index = bin_of(margin);
  const Bin& bin = bins_[index];
  return (bin.stood + kPriorDrafts * (1 - kPriorRefusals[index])) / (bin.stood + bin.refused + kPriorDrafts);
}

void Confidence::report(float margin, bool stood) {
  check(margin >= 0, "a margin is not negative");
  Bin& bin = bins_[bin_of(margin)];
  constexpr double kDecay = 1 - 1 / kMemoryDrafts;
  bin.stood = bin.stood * kDecay + (stood ? 1 : 0);
  bin.refused = bin.refused * kDecay + (stood ? 0 : 1);
}

}  // namespace vericache
