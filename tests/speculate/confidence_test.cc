#include "speculate/confidence.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace vericache {
namespace {

constexpr float kMargins[] = {0, 0.1f, 0.2f, 0.4f, 0.9f, 1.5f, 3, 7, 8};

TEST(Confidence, BelievesWideMarginsMoreBeforeItHasSeenAnything) {
  const Confidence confidence;
  double before = 0;
  for (const float margin : kMargins) {
    EXPECT_GE(confidence.stands(margin), before) << margin;
    EXPECT_LT(confidence.stands(margin), 1) << margin;
    before = confidence.stands(margin);
  }
  EXPECT_LE(confidence.stands(0), 0.6);
  EXPECT_GE(confidence.stands(8), 0.99);
}

// Whatever the share of refusals at each margin, that is what it comes to say.
TEST(Confidence, LearnsWhatVerificationsSay) {
  for (const double steepness : {0.2, 1.0, 5.0}) {
    Confidence confidence;
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> uniform(0, 1);
    const auto refusals = [&](float margin) { return 0.6 * std::exp(-steepness * margin); };
    for (int i = 0; i < 20'000; ++i) {
      const float margin = kMargins[i % std::size(kMargins)];
      confidence.report(margin, uniform(random) >= refusals(margin));
    }
    // 0 and 0.1, and no others, share a bin.
    EXPECT_NEAR(confidence.stands(0), 1 - (refusals(0) + refusals(0.1f)) / 2, 0.1);
    for (size_t i = 2; i < std::size(kMargins); ++i) {
      EXPECT_NEAR(confidence.stands(kMargins[i]), 1 - refusals(kMargins[i]), 0.1) << steepness << " " << kMargins[i];
    }
  }
}

// Another text, or another compressor after a restart: old news fades.
TEST(Confidence, ForgetsWhatNoLongerHolds) {
  Confidence confidence;
  for (int i = 0; i < 5000; ++i) {
    confidence.report(1.5f, false);
  }
  EXPECT_LT(confidence.stands(1.5f), 0.05);
  for (int i = 0; i < 2500; ++i) {
    confidence.report(1.5f, true);
  }
  EXPECT_GT(confidence.stands(1.5f), 0.95);
}

}  // namespace
}  // namespace vericache
