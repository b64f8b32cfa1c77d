#include "speculate/compressor_choice.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "speculate/horizon.h"

namespace vericache {
namespace {

double wire_seconds(const CompressorCandidate& candidate, const DecodingCircumstances& c) {
  return c.wire_bytes_per_second > 0 ? static_cast<double>(candidate.wire_bytes) / c.wire_bytes_per_second : 0;
}

int sequences_that_fit(const CompressorCandidate& candidate, const DecodingCircumstances& c) {
  if (candidate.fixed_bytes > c.device_bytes) {
    return 0;
  }
  const size_t fit = (c.device_bytes - candidate.fixed_bytes) / std::max<size_t>(candidate.sequence_bytes, 1);
  return static_cast<int>(std::min(fit, static_cast<size_t>(std::min(c.sequences, candidate.stored_sequences))));
}

// Every sequence decides one token in each pass.
CompressorForecast plain_forecast(const CompressorCandidate& candidate, const DecodingCircumstances& c, int n) {
  const double pass = c.verify_base + n * c.verify_row;
  const double wire = n * wire_seconds(candidate, c);
  return {.tokens_per_second = n / std::max({pass, wire, std::numeric_limits<double>::min()}),
          .sequences = n,
          .horizon = 0,
          .agreement = 1,
          .bound = wire > pass ? DecodingBound::wire : DecodingBound::verify};
}

// A round of all sequences: they draft together, and are verified one by one while others draft. A verdict comes when
// all layers have crossed the wire.
RoundCost round_cost(const CompressorCandidate& candidate, const DecodingCircumstances& c, int n) {
  return {.draft_token = candidate.draft_base + n * candidate.draft_row,
          .wire = n * wire_seconds(candidate, c),
          .verify = n * c.verify_base,
          .verify_token = n * c.verify_row,
          .verdict = wire_seconds(candidate, c)};
}

DecodingBound bound_of(const RoundCost& cost, int horizon) {
  const double draft = horizon * cost.draft_token;
  const double verify = cost.verify + cost.verify_token * (horizon + 1);
  if (cost.wire > draft) {
    return cost.wire > verify ? DecodingBound::wire : DecodingBound::verify;
  }
  return draft > verify ? DecodingBound::draft : DecodingBound::verify;
}

std::string_view bound_text(DecodingBound bound) {
  switch (bound) {
    case DecodingBound::memory:
      return "memory";
    case DecodingBound::draft:
      return "draft steps";
    case DecodingBound::wire:
      return "the wire";
    case DecodingBound::verify:
      return "exact passes";
  }
  return "";
}

std::string describe(const CompressorCandidate& candidate, const CompressorForecast& f, int wanted) {
  std::string text = fmt::format("{:.4g} tokens/s expected", f.tokens_per_second);
  if (wanted > 1) {
    text += fmt::format(", {} of {} sequences fit", f.sequences, wanted);
  }
  if (f.horizon > 0) {
    text += fmt::format(", {:.0f} of {:.0f} probed drafts agree, horizon {}", candidate.agreed, candidate.judged,
                        f.horizon);
  }
  return text + fmt::format(", most of the time goes to {}", bound_text(f.bound));
}

}  // namespace

CompressorForecast forecast(const CompressorCandidate& candidate, const DecodingCircumstances& c) {
  const int n = sequences_that_fit(candidate, c);
  if (n == 0) {
    return {};
  }
  if (!candidate.drafts) {
    return plain_forecast(candidate, c, n);
  }
  const double agreement = (candidate.agreed + 1) / (candidate.judged + 2);
  const RoundCost cost = round_cost(candidate, c, n);
  CompressorForecast best;
  for (int horizon = c.least_horizon; horizon <= c.most_horizon; ++horizon) {
    if (const double rate = n * round_rate(horizon, agreement, cost); rate > best.tokens_per_second) {
      best = {.tokens_per_second = rate,
              .sequences = n,
              .horizon = horizon,
              .agreement = agreement,
              .bound = bound_of(cost, horizon)};
    }
  }
  return best;
}

CompressorChoice choose_compressor(std::span<const CompressorCandidate> candidates, const DecodingCircumstances& c) {
  CompressorChoice choice;
  int second = -1;
  const auto rate = [&](int i) { return i < 0 ? 0.0 : choice.forecasts[static_cast<size_t>(i)].tokens_per_second; };
  for (const CompressorCandidate& candidate : candidates) {
    choice.forecasts.push_back(forecast(candidate, c));
    const int i = static_cast<int>(choice.forecasts.size()) - 1;
    if (rate(i) > rate(choice.winner)) {
      second = choice.winner;
      choice.winner = i;
    } else if (rate(i) > rate(second)) {
      second = i;
    }
  }
  if (choice.winner < 0) {
    choice.reason = "no compressor leaves room for one sequence";
    return choice;
  }
  const size_t winner = static_cast<size_t>(choice.winner);
  choice.reason = fmt::format("{}: {}", candidates[winner].name,
                              describe(candidates[winner], choice.forecasts[winner], c.sequences));
  if (second >= 0) {
    choice.reason +=
        fmt::format("; next best {} with {:.4g}", candidates[static_cast<size_t>(second)].name, rate(second));
  }
  return choice;
}

}  // namespace vericache
