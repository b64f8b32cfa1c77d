#include "compress/pyramidkv.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace vericache {

std::string PyramidKv::name() const {
  return fmt::format("pyramidkv:budget={},window={},kernel={},beta={}{}", options_.budget.amount, options_.window,
                     options_.kernel, beta_, format_suffix());
}

// The bottom layer's, of however many layers.
int PyramidKv::kept_tokens(int tokens) const {
  return head_tokens(tokens, 0, 2);
}

int PyramidKv::head_tokens(int tokens, int layer, int layers) const {
  const Budget& budget = options_.budget;
  if (layers < 2) {
    return budget.tokens_of(tokens);
  }
  const bool share = budget.amount <= 1;
  const double total = share ? budget.tokens_of(tokens) : std::max(budget.amount, static_cast<double>(budget.least));
  const double window = std::min(static_cast<double>(options_.window), total);
  double bottom = (total - window) * (2 - 1 / beta_);
  if (share) {
    bottom = std::min(bottom, tokens - window);
  }
  const double top = 2 * (total - window) - bottom;
  return std::min(tokens, static_cast<int>(std::lround(window + bottom - (bottom - top) * layer / (layers - 1))));
}

}  // namespace vericache
