#include "speculate/horizon.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "base/error.h"

namespace vericache {
namespace {

// How many of `drafted` tokens stand when each agrees with probability `agreement`.
int accepted_of(int drafted, double agreement, std::mt19937_64& random) {
  int accepted = 0;
  while (accepted < drafted && static_cast<double>(random() >> 11) * 0x1p-53 < agreement) {
    ++accepted;
  }
  return accepted;
}

void run(Horizon& horizon, int rounds, double agreement, const RoundCost& cost, std::mt19937_64& random) {
  for (int i = 0; i < rounds; ++i) {
    horizon.report(horizon.tokens(), accepted_of(horizon.tokens(), agreement, random), cost);
  }
}

int best_of(int least, int most, double agreement, const RoundCost& cost) {
  int best = least;
  for (int h = least; h <= most; ++h) {
    best = round_rate(h, agreement, cost) > round_rate(best, agreement, cost) ? h : best;
  }
  return best;
}

TEST(Horizon, FixedNeverMoves) {
  Horizon horizon = Horizon::fixed(7);
  std::mt19937_64 random(1);
  for (const double agreement : {0.0, 1.0, 0.5}) {
    for (int i = 0; i < 50; ++i) {
      run(horizon, 1, agreement, {.wire = 100}, random);
      ASSERT_EQ(horizon.tokens(), 7);
    }
  }
}

// One more draft is worth its time while the chance that it counts is above what a round gives for the same time.
TEST(Horizon, TheLeastChanceIsWhatTheBestRoundGives) {
  std::mt19937_64 random(5);
  for (const double agreement : {0.8, 0.95, 0.99}) {
    for (const double verify : {1.0, 8.0, 30.0}) {
      const RoundCost cost{.draft_token = 2, .verify = 2 * verify};
      Horizon horizon = Horizon::adaptive(1, 128);
      run(horizon, 300, agreement, cost, random);
      const int best = best_of(1, 128, agreement, cost);
      EXPECT_NEAR(horizon.least_chance(), std::clamp(round_rate(best, agreement, cost) * 2, 0.2, 0.85), 0.08);
      if (best < 128 && horizon.least_chance() > 0.2 && horizon.least_chance() < 0.85) {
        EXPECT_NEAR(std::pow(agreement, best), horizon.least_chance(), 0.12) << agreement << " " << verify;
      }
    }
  }
  EXPECT_EQ(Horizon::fixed(8).least_chance(), 0);
  EXPECT_EQ(Horizon::fixed(8).reach(), 8);
  EXPECT_EQ(Horizon::adaptive(2, 40).reach(), 40);
}

TEST(Horizon, RefusesImpossibleBounds) {
  EXPECT_THROW(Horizon::fixed(-1), Error);
  EXPECT_THROW(Horizon::adaptive(0, 4), Error);
  EXPECT_THROW(Horizon::adaptive(5, 4), Error);
  EXPECT_EQ(Horizon::adaptive(3, 3).tokens(), 3);
}

TEST(Horizon, RateIsExpectedTokensPerCost) {
  const RoundCost cost{.draft_token = 2, .wire = 7, .verify = 3, .verify_token = 0.5};
  EXPECT_NEAR(round_rate(3, 0.5, cost), (1 + 0.5 + 0.25 + 0.125) / (7 + 3 + 0.5 * 4), 1e-12);
  EXPECT_NEAR(round_rate(4, 1.0, cost), 5 / (8 + 3 + 0.5 * 5), 1e-12);
  EXPECT_NEAR(round_rate(4, 0.0, cost), 1 / (8 + 3 + 0.5 * 5), 1e-12);
}

TEST(Horizon, GoesToTheMostWhenAllAgree) {
  Horizon horizon = Horizon::adaptive(1, 128);
  std::mt19937_64 random(1);
  run(horizon, 30, 1.0, {.draft_token = 1, .verify = 20}, random);
  EXPECT_EQ(horizon.tokens(), 128);
}

TEST(Horizon, GoesNearTheLeastWhenFewAgreeUnlessTheWireDominates) {
  std::mt19937_64 random(1);
  Horizon horizon = Horizon::adaptive(1, 128);
  run(horizon, 100, 0.1, {.draft_token = 1, .verify = 2}, random);
  EXPECT_LE(horizon.tokens(), 2);
  Horizon waiting = Horizon::adaptive(1, 128);
  run(waiting, 100, 0.1, {.draft_token = 1, .wire = 40, .verify = 2}, random);
  EXPECT_GE(waiting.tokens(), 20) << "drafting is free while the wire is busy";
}

TEST(Horizon, FollowsAChange) {
  std::mt19937_64 random(3);
  const RoundCost cost{.draft_token = 1, .verify = 5};
  Horizon horizon = Horizon::adaptive(1, 64);
  run(horizon, 40, 0.995, cost, random);
  EXPECT_GE(horizon.tokens(), 16);
  run(horizon, 100, 0.2, cost, random);
  EXPECT_LE(horizon.tokens(), 3);
  run(horizon, 100, 0.995, cost, random);
  EXPECT_GE(horizon.tokens(), 16);
}

TEST(Horizon, SurvivesARoundWithoutDraftsOrCost) {
  Horizon horizon = Horizon::adaptive(1, 64);
  horizon.report(0, 0, {.draft_token = 0, .wire = 0, .verify = 0, .verify_token = 0});
  EXPECT_GE(horizon.tokens(), 1);
  EXPECT_LE(horizon.tokens(), 64);
  EXPECT_TRUE(std::isfinite(horizon.agreement()));
}

struct Round {
  int drafted;
  int accepted;
};

std::vector<Round> some_rounds() {
  std::vector<Round> rounds;
  for (int i = *rc::gen::inRange(1, 30); i > 0; --i) {
    const int drafted = *rc::gen::inRange(0, 65);
    rounds.push_back({drafted, *rc::gen::inRange(0, drafted + 1)});
  }
  return rounds;
}

RC_GTEST_PROP(Horizon, MovesCalmlyWithinItsBounds, ()) {
  const int least = *rc::gen::inRange(1, 20);
  const int most = least + *rc::gen::inRange(0, 100);
  Horizon horizon = Horizon::adaptive(least, most);
  for (const Round& round : some_rounds()) {
    const int before = horizon.tokens();
    horizon.report(round.drafted, round.accepted,
                   {.draft_token = *rc::gen::inRange(0, 5) * 0.5,
                    .wire = *rc::gen::inRange(0, 100) * 1.0,
                    .verify = *rc::gen::inRange(0, 30) * 1.0});
    RC_ASSERT(horizon.tokens() >= least && horizon.tokens() <= most);
    RC_ASSERT(std::abs(horizon.tokens() - before) <= std::max(1, before / 2));
  }
}

RC_GTEST_PROP(Horizon, ALongerWireNeverShortensIt, ()) {
  RoundCost near_wire{.draft_token = *rc::gen::inRange(1, 10) * 0.5,
                      .wire = *rc::gen::inRange(0, 100) * 1.0,
                      .verify = *rc::gen::inRange(0, 30) * 1.0,
                      .verify_token = *rc::gen::inRange(0, 3) * 0.1};
  RoundCost far_wire = near_wire;
  far_wire.wire += *rc::gen::inRange(0, 100);
  Horizon near_horizon = Horizon::adaptive(1, 64);
  Horizon far_horizon = Horizon::adaptive(1, 64);
  for (const Round& round : some_rounds()) {
    near_horizon.report(round.drafted, round.accepted, near_wire);
    far_horizon.report(round.drafted, round.accepted, far_wire);
    RC_ASSERT(far_horizon.tokens() >= near_horizon.tokens());
  }
}

// Tokens per cost over many rounds, against the best fixed horizon for the true agreement.
TEST(Horizon, ComesWithinAFewPercentOfTheBestRate) {
  const RoundCost costs[] = {{.draft_token = 1, .verify = 3, .verify_token = 0.1},
                             {.draft_token = 1, .verify = 20, .verify_token = 0.05},
                             {.draft_token = 1, .wire = 30, .verify = 5}};
  std::mt19937_64 random(7);
  for (const RoundCost& cost : costs) {
    for (const double agreement : {0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.995}) {
      Horizon horizon = Horizon::adaptive(1, 128);
      run(horizon, 100, agreement, cost, random);
      double tokens = 0;
      double spent = 0;
      for (int i = 0; i < 3000; ++i) {
        const int h = horizon.tokens();
        tokens += (1 - std::pow(agreement, h + 1)) / (1 - agreement);
        spent += std::max(h * cost.draft_token, cost.wire) + cost.verify + cost.verify_token * (h + 1);
        run(horizon, 1, agreement, cost, random);
      }
      const double best = round_rate(best_of(1, 128, agreement, cost), agreement, cost);
      EXPECT_GE(tokens / spent, 0.97 * best) << "agreement " << agreement << " wire " << cost.wire;
    }
  }
}

}  // namespace
}  // namespace vericache
