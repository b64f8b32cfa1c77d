#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"

namespace vericache {
namespace {

// Llama 3.1: wavelengths that fit often into the original context stay, those that do not fit are stretched, those
// between are blended.
double llama3_frequency(const Rope& rope, double frequency) {
  const double turns = rope.original_max_position * frequency / (2 * std::numbers::pi);  // over the original context
  if (turns > rope.high_freq_factor) {
    return frequency;
  }
  if (turns < rope.low_freq_factor) {
    return frequency / rope.factor;
  }
  const double keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - keep) * frequency / rope.factor + keep * frequency;
}

// The (fractional) index of the pair that makes `turns` full turns over the original context.
double yarn_dimension(const Rope& rope, double turns, int head_dim) {
  return head_dim * std::log(rope.original_max_position / (turns * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
}

void apply_yarn(const Rope& rope, int head_dim, std::vector<double>& frequencies) {
  double low = yarn_dimension(rope, rope.beta_fast, head_dim);
  double high = yarn_dimension(rope, rope.beta_slow, head_dim);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) {
    high += 0.001;  // a step instead of a ramp, as transformers has it
  }
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double stretched = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] = frequencies[i] / rope.factor * stretched + frequencies[i] * (1 - stretched);
  }
}

}  // namespace

std::vector<double> rope_inverse_frequencies(const Rope& rope, int head_dim) {
  check(head_dim > 0 && head_dim % 2 == 0, "a rotated head has an even size");
  std::vector<double> frequencies(static_cast<size_t>(head_dim) / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(rope.theta, -2.0 * static_cast<double>(i) / head_dim);
  }
  switch (rope.type) {
    case RopeType::standard:
      break;
    case RopeType::linear:
      for (double& frequency : frequencies) {
        frequency /= rope.factor;
      }
      break;
    case RopeType::llama3:
      for (double& frequency : frequencies) {
        frequency = llama3_frequency(rope, frequency);
      }
      break;
    case RopeType::yarn:
      apply_yarn(rope, head_dim, frequencies);
      break;
  }
  return frequencies;
}

double yarn_attention_factor(double factor, double mscale, double mscale_all_dim) {
  const auto term = [factor](double weight) { return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0; };
  return mscale != 0 && mscale_all_dim != 0 ? term(mscale) / term(mscale_all_dim) : term(1.0);
}

}  // namespace vericache
