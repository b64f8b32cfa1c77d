#include "backend/sampling.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/philox.h"
#include "base/error.h"

namespace vericache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

// The tokens that the filters leave, best first, with their probabilities: sorts everything, sums in order.
struct Kept {
  std::vector<TokenId> tokens;
  std::vector<long double> probabilities;
};

Kept reference_kept(const std::vector<float>& logits, const Sampling& sampling) {
  Kept kept;
  for (size_t id = 0; id < logits.size(); ++id) {
    if (logits[id] > -kInfinity) {
      kept.tokens.push_back(static_cast<TokenId>(id));
    }
  }
  std::stable_sort(kept.tokens.begin(), kept.tokens.end(), [&](TokenId a, TokenId b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  const auto keep = [&](size_t count) {
    kept.tokens.resize(std::min(count, kept.tokens.size()));
    kept.probabilities.resize(kept.tokens.size());
    long double total = 0;
    const auto logit = [&](size_t rank) -> long double { return logits[static_cast<size_t>(kept.tokens[rank])]; };
    for (size_t rank = 0; rank < kept.tokens.size(); ++rank) {
      kept.probabilities[rank] = std::exp((logit(rank) - logit(0)) / sampling.temperature);
      total += kept.probabilities[rank];
    }
    for (long double& p : kept.probabilities) {
      p /= total;
    }
  };
  keep(sampling.top_k > 0 ? static_cast<size_t>(sampling.top_k) : logits.size());
  if (sampling.top_p < 1) {
    long double sum = 0;
    size_t count = 0;
    while (count < kept.tokens.size() && sum < static_cast<long double>(sampling.top_p)) {
      sum += kept.probabilities[count++];
    }
    keep(count);
  }
  keep(static_cast<size_t>(std::count_if(kept.probabilities.begin(), kept.probabilities.end(),
                                         [&](long double p) { return p >= sampling.min_p * kept.probabilities[0]; })));
  return kept;
}

double reference_noise(uint64_t seed, int position, TokenId token) {
  const auto id = static_cast<uint32_t>(token);
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const uint32_t word = philox4x32({id / 4, static_cast<uint32_t>(position), 0, 0}, key)[id % 4];
  return -std::log(-std::log((word + 0.5) / 4294967296.0));
}

TokenId reference_choose(const std::vector<float>& logits, const Sampling& sampling, int position,
                         double* margin = nullptr) {
  double unwanted;
  margin = margin == nullptr ? &unwanted : margin;
  *margin = 0;
  const auto infinite = std::find(logits.begin(), logits.end(), kInfinity);
  if (infinite != logits.end()) {
    return static_cast<TokenId>(infinite - logits.begin());
  }
  TokenId best = -1;
  double best_value = 0;
  double second_value = -HUGE_VAL;
  const bool greedy = sampling.temperature == 0;
  Sampling all;
  all.temperature = 1;
  std::vector<TokenId> tokens = reference_kept(logits, greedy ? all : sampling).tokens;
  std::sort(tokens.begin(), tokens.end());
  for (const TokenId token : tokens) {
    const double logit = logits[static_cast<size_t>(token)];
    const double value =
        greedy ? logit : logit / sampling.temperature + reference_noise(sampling.seed, position, token);
    if (best < 0 || value > best_value) {
      second_value = best < 0 ? second_value : best_value;
      best = token;
      best_value = value;
    } else {
      second_value = std::max(second_value, value);
    }
  }
  if (best >= 0) {
    *margin = std::min<double>((best_value - second_value) * (greedy ? 1 : sampling.temperature), kMostMargin);
  }
  return std::max(best, 0);
}

class Cases {
 public:
  explicit Cases(uint64_t seed) : random_(seed) {}

  int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

  std::vector<float> logits(int most) {
    std::vector<float> out(static_cast<size_t>(1 + below(most)));
    const int kind = below(5);
    const double spread = std::exp(std::log(0.01) + uniform() * std::log(4000));
    for (size_t i = 0; i < out.size(); ++i) {
      std::normal_distribution<double> normal(0, spread);
      out[i] = static_cast<float>(kind == 0 ? below(4) : kind == 1 ? std::round(normal(random_)) : normal(random_));
      if (kind == 2 && below(8) == 0) {
        const float odd[] = {kNan, -kInfinity, -3e38f, below(50) == 0 ? kInfinity : 1.f};
        out[i] = odd[below(4)];
      }
    }
    if (kind == 3) {
      std::sort(out.begin(), out.end());
    }
    return out;
  }

  Sampling sampling(size_t vocabulary) {
    Sampling s;
    const float temperatures[] = {0.f, 1e-30f, 0.01f, 0.7f, 1.f, 1.f, 1.5f, 40.f, 1e30f};
    s.temperature = temperatures[below(9)];
    s.top_k = below(2) ? 0 : 1 + below(below(2) ? 50 : static_cast<int>(vocabulary) + 2);
    s.top_p = below(2) ? 1.f : static_cast<float>(1 - uniform());
    s.min_p = below(2) ? 0.f : static_cast<float>(below(4) ? uniform() * 0.2 : uniform());
    s.seed = random_();
    return s;
  }

 private:
  std::mt19937_64 random_;
};

RC_GTEST_PROP(Sampling, EqualsTheReference, ()) {
  Cases cases(*rc::gen::noShrink(rc::gen::arbitrary<uint64_t>()));
  const std::vector<float> logits = cases.logits(cases.below(10) == 0 ? 6000 : 60);
  for (int i = 0; i < 20; ++i) {
    const Sampling s = cases.sampling(logits.size());
    const int position = cases.below(std::numeric_limits<int>::max());
    RC_LOG() << "tokens " << logits.size() << " temperature " << s.temperature << " top_k " << s.top_k << " top_p "
             << s.top_p << " min_p " << s.min_p << "\n";
    RC_ASSERT(choose(logits, s, position) == reference_choose(logits, s, position));
  }
}

// Asking for the margin changes no choice; values of 1e38 and temperatures of 1e30 round away what is small beside
// them.
RC_GTEST_PROP(Sampling, MarginEqualsTheReference, ()) {
  Cases cases(*rc::gen::noShrink(rc::gen::arbitrary<uint64_t>()));
  const std::vector<float> logits = cases.logits(cases.below(10) == 0 ? 6000 : 60);
  double largest = 0;
  for (const float logit : logits) {
    largest = std::isfinite(logit) ? std::max<double>(largest, std::abs(logit)) : largest;
  }
  for (int i = 0; i < 20; ++i) {
    const Sampling s = cases.sampling(logits.size());
    const int position = cases.below(std::numeric_limits<int>::max());
    RC_LOG() << "tokens " << logits.size() << " temperature " << s.temperature << " top_k " << s.top_k << " top_p "
             << s.top_p << " min_p " << s.min_p << "\n";
    float margin = -1;
    double expected = -1;
    RC_ASSERT(choose(logits, s, position, &margin) == reference_choose(logits, s, position, &expected));
    RC_ASSERT(std::abs(margin - expected) <= 1e-5 + 1e-6 * std::min(largest, 8e6) + 1e-12 * s.temperature);
  }
}

// At a high temperature every survivor is likely, so a wrong end of the kept prefix shows; long rows fill top-k's
// buffer many times.
TEST(Sampling, EqualsTheReferenceOnLongFlatRows) {
  Cases cases(3);
  std::vector<float> logits(8192);
  for (int shape = 0; shape < 4; ++shape) {
    for (float& logit : logits) {
      logit = static_cast<float>(shape == 3 ? cases.below(40) : cases.uniform() * 40);
    }
    if (shape == 1) {
      std::sort(logits.begin(), logits.end());
    } else if (shape == 2) {
      std::sort(logits.begin(), logits.end(), std::greater<>());
    }
    for (int i = 0; i < 60; ++i) {
      Sampling s{.temperature = i % 3 ? 100.f : 5.f, .seed = static_cast<uint64_t>(i)};
      s.top_k = i % 4 == 3 ? 0 : 1 + cases.below(i % 2 ? 8192 : 60);
      s.top_p = i % 4 > 1 ? static_cast<float>(1 - cases.uniform()) : 1.f;
      ASSERT_EQ(choose(logits, s, i), reference_choose(logits, s, i)) << shape << " " << s.top_k << " " << s.top_p;
    }
  }
}

TEST(Sampling, EqualsTheReferenceOnARealVocabulary) {
  Cases cases(1);
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(152'064);
  for (float& logit : logits) {
    logit = normal(random);
  }
  logits[77'777] = 15;
  for (int i = 0; i < 12; ++i) {
    Sampling s = cases.sampling(logits.size());
    s.temperature = i % 2 ? 1.f : 0.5f;
    EXPECT_EQ(choose(logits, s, i), reference_choose(logits, s, i)) << s.top_k << " " << s.top_p << " " << s.min_p;
  }
}

TEST(Sampling, GreedyBreaksTiesToTheLowerToken) {
  EXPECT_EQ(choose(std::vector<float>{1, 3, 2, 3, 3}, {}, 0), 1);
  EXPECT_EQ(choose(std::vector<float>(100, -2.f), {}, 0), 0);
  EXPECT_EQ(choose(std::vector<float>{-0.f, 0.f}, {}, 0), 0);
}

TEST(Sampling, OddLogits) {
  for (const float temperature : {0.f, 1.f}) {
    Sampling s;
    s.temperature = temperature;
    s.top_p = 0.9f;
    EXPECT_EQ(choose(std::vector<float>(20, kNan), s, 3), 0);
    EXPECT_EQ(choose(std::vector<float>(20, -kInfinity), s, 3), 0);
    EXPECT_EQ(choose(std::vector<float>{kNan, -kInfinity, -5, kNan}, s, 3), 2);
    EXPECT_EQ(choose(std::vector<float>{1e38f, kNan, kInfinity, kInfinity, 3}, s, 3), 2);
    EXPECT_EQ(choose(std::vector<float>{-3e38f, 3e38f, -3e38f}, s, 3), 1);
  }
}

TEST(Sampling, EqualTokensSurviveInOrderOfTheirIds) {
  const std::vector<float> logits(10, 1.f);
  Sampling by_count;
  by_count.temperature = 1;
  by_count.top_k = 3;
  Sampling by_mass;
  by_mass.temperature = 1;
  by_mass.top_p = 0.5f;
  for (int position = 0; position < 200; ++position) {
    EXPECT_LT(choose(logits, by_count, position), 3);
    EXPECT_LT(choose(logits, by_mass, position), 5);
  }
}

// Pearson's statistic of `draws` against `probabilities`, which are of the tokens 0, 1, ...
double chi_square(const std::vector<int>& draws, const std::vector<double>& probabilities) {
  double total = 0;
  for (const int count : draws) {
    total += count;
  }
  double statistic = 0;
  for (size_t i = 0; i < draws.size(); ++i) {
    const double expected = total * probabilities[i];
    if (expected == 0) {
      EXPECT_EQ(draws[i], 0) << "token " << i << " should not survive";
    } else {
      statistic += (draws[i] - expected) * (draws[i] - expected) / expected;
    }
  }
  return statistic;
}

void expect_distribution(const Sampling& sampling) {
  constexpr int kPositions = 40'000;
  std::vector<float> logits(32);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(i * 7 % 32) * 0.12f;
  }
  const Kept kept = reference_kept(logits, sampling);
  std::vector<double> probabilities(logits.size());
  for (size_t rank = 0; rank < kept.tokens.size(); ++rank) {
    probabilities[static_cast<size_t>(kept.tokens[rank])] = static_cast<double>(kept.probabilities[rank]);
  }
  std::vector<int> draws(logits.size());
  for (int position = 0; position < kPositions; ++position) {
    ++draws[static_cast<size_t>(choose(logits, sampling, position))];
  }
  EXPECT_LT(chi_square(draws, probabilities), 66)
      << "1 in 4,000 by chance at 31 degrees of freedom, fewer with filters";
}

TEST(Sampling, FollowsSoftmax) {
  expect_distribution({.temperature = 0.8f, .seed = 1});
}
TEST(Sampling, FollowsSoftmaxWhenHot) {
  expect_distribution({.temperature = 3, .seed = 0x123456789abcdef});
}
TEST(Sampling, FollowsTopK) {
  expect_distribution({.temperature = 1, .top_k = 9, .seed = 2});
}
TEST(Sampling, FollowsTopP) {
  expect_distribution({.temperature = 1, .top_p = 0.7f, .seed = 3});
}
TEST(Sampling, FollowsMinP) {
  expect_distribution({.temperature = 1, .min_p = 0.2f, .seed = 4});
}
TEST(Sampling, FollowsAllFilters) {
  expect_distribution({.temperature = 1.2f, .top_k = 20, .top_p = 0.8f, .min_p = 0.3f, .seed = 5});
}

// The tokens of (position, position + 1) and of (seed, seed + 1) must be independent: their pairs are uniform.
TEST(Sampling, PositionsAndSeedsAreIndependent) {
  const std::vector<float> logits(6, 0.f);
  const std::vector<double> uniform(36, 1 / 36.0);
  const Sampling s{.temperature = 1, .seed = 41};
  Sampling next_seed = s;
  next_seed.seed = 42;
  Sampling high_seed = s;
  high_seed.seed = s.seed + (uint64_t{1} << 32);
  std::vector<int> by_position(36);
  std::vector<int> by_seed(36);
  std::vector<int> by_high_seed(36);
  for (int position = 0; position < 30'000; ++position) {
    const size_t row = static_cast<size_t>(choose(logits, s, position)) * 6;
    ++by_position[row + static_cast<size_t>(choose(logits, s, position + 1))];
    ++by_seed[row + static_cast<size_t>(choose(logits, next_seed, position))];
    ++by_high_seed[row + static_cast<size_t>(choose(logits, high_seed, position))];
  }
  for (const auto& draws : {by_position, by_seed, by_high_seed}) {
    EXPECT_LT(chi_square(draws, uniform), 72) << "1 in 4,000 by chance at 35 degrees of freedom";
  }
}

// The noise is a contract: a seed that a user keeps must keep its text.
TEST(Sampling, SeedsKeepTheirTokens) {
  std::vector<float> logits(1000);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(i * 37 % 100) * 0.05f;
  }
  const Sampling s{.temperature = 0.9f, .top_k = 400, .top_p = 0.95f, .min_p = 0.01f, .seed = 2024};
  std::vector<TokenId> tokens;
  for (int position = 100; position < 108; ++position) {
    tokens.push_back(choose(logits, s, position));
  }
  EXPECT_EQ(tokens, (std::vector<TokenId>{948, 824, 413, 178, 727, 208, 743, 481}));
}

void expect_refused(const Sampling& sampling, const std::string& field) {
  try {
    validate(sampling);
    ADD_FAILURE() << field << " should have been refused";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(field), std::string::npos) << error.what();
  }
}

TEST(Sampling, ValidateNamesTheField) {
  EXPECT_NO_THROW(validate({}));
  EXPECT_NO_THROW(validate({.temperature = 2, .top_k = 1, .top_p = 1e-6f, .min_p = 1, .seed = ~uint64_t{0}}));
  for (const float bad : {-0.1f, kInfinity, kNan}) {
    expect_refused({.temperature = bad}, "temperature");
  }
  expect_refused({.top_k = -1}, "top_k");
  for (const float bad : {0.f, -1.f, 1.01f, kNan, kInfinity}) {
    expect_refused({.top_p = bad}, "top_p");
  }
  for (const float bad : {-0.01f, 1.01f, kNan}) {
    expect_refused({.min_p = bad}, "min_p");
  }
}

}  // namespace
}  // namespace vericache
