#include "speculate/horizon.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/error.h"

namespace vericache {
namespace {

constexpr int kFirstTokens = 16;  // before any cost is known; the prior expects a refusal after about 20
constexpr double kFirstChance = 0.6;
// Bounds of least_chance(): even where a verification is free a draft that likely stands is worth waiting for, and even
// where it is dear one that hardly can stand is not.
constexpr double kLeastChance = 0.2;
constexpr double kMostChance = 0.85;
// A judged token's weight falls to 1/e after this many more, or this many more rounds: agreement near 1 takes many
// tokens to tell from 1, low agreement shows in a few, and its short rounds must not keep old news alive.
constexpr double kMemoryTokens = 512;
constexpr double kMemoryRounds = 40;
constexpr double kLargestStep = 1.0 / 2;  // of the horizon, in one report

// stands: the chance that all drafts do.
double cost_of(int horizon, double stands, const RoundCost& cost) {
  return std::max(horizon * cost.draft_token, cost.wire) + cost.verify + cost.verify_token * (horizon + 1) +
         (1 - stands) * cost.verdict;
}

// The horizon of the best rate, the least one if several share it.
int best_horizon(int least, int most, double agreement, const RoundCost& cost) {
  double reached = 1;  // agreement^h: the chance that draft token h counts
  double expected = 1;
  int best = least;
  double best_rate = -1;
  for (int horizon = 1; horizon <= most; ++horizon) {
    reached *= agreement;
    expected += reached;
    if (horizon < least) {
      continue;
    }
    const double rate = expected / std::max(cost_of(horizon, reached, cost), std::numeric_limits<double>::min());
    if (rate > best_rate) {
      best = horizon;
      best_rate = rate;
    }
  }
  return best;
}

}  // namespace

double round_rate(int horizon, double agreement, const RoundCost& cost) {
  const double expected = agreement < 1 ? (1 - std::pow(agreement, horizon + 1)) / (1 - agreement) : horizon + 1;
  const double time = cost_of(horizon, std::pow(agreement, horizon), cost);
  return expected / std::max(time, std::numeric_limits<double>::min());
}

Horizon Horizon::fixed(int tokens) {
  if (tokens < 0) {
    throw Error("horizon {}: give 0 (no drafting) or more", tokens);
  }
  return Horizon(tokens, tokens, tokens, 0);
}

Horizon Horizon::adaptive(int least, int most) {
  if (least < 1 || least > most) {
    throw Error("adaptive horizon from {} to {}: the least must be at least 1 and not above the most", least, most);
  }
  return Horizon(least, most, std::clamp(kFirstTokens, least, most), kFirstChance);
}

void Horizon::report(int drafted, int accepted, const RoundCost& cost) {
  check(accepted >= 0 && accepted <= drafted, "a round accepts 0 to all of its drafts");
  check(cost.draft_token >= 0 && cost.wire >= 0 && cost.verify >= 0 && cost.verify_token >= 0 && cost.verdict >= 0,
        "a cost is not negative");
  // Drafts after the first refusal were never judged: they say nothing about agreement.
  const int refused = accepted < drafted ? 1 : 0;
  const double decay = std::exp(-(accepted + refused) / kMemoryTokens - 1 / kMemoryRounds);
  agreed_ = agreed_ * decay + accepted;
  refused_ = refused_ * decay + refused;

  const int best = best_horizon(least_, most_, agreement(), cost);
  const int step = std::max(1, static_cast<int>(tokens_ * kLargestStep));
  tokens_ += std::clamp(best - tokens_, -step, step);
  if (least_ < most_) {
    // At the best of all horizons the next draft gives what the whole gives (renewal reward): chance / draft_token =
    // rate.
    least_chance_ = std::clamp(round_rate(best, agreement(), cost) * cost.draft_token, kLeastChance, kMostChance);
  }
}

}  // namespace vericache
