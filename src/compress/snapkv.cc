#include "compress/snapkv.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace vericache {

std::string SnapKv::name() const {
  return fmt::format("snapkv:budget={},window={},kernel={}{}", options_.budget.amount, options_.window, options_.kernel,
                     format_suffix());
}

void SnapKv::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, std::span<float> scores) {
  mass_.assign(scores.size(), 0.0f);
  kernels.attention_mass({.shape = full.shape,
                          .heads = seen.heads,
                          .scale = seen.scale,
                          .q = seen.q,
                          .log_sum_exp = seen.log_sum_exp,
                          .sequence = {.first_row = 0, .rows = seen.rows, .position = seen.position, .kv = full.kv},
                          .tokens = tokens,
                          .mass = mass_.data()});
  const int reach = options_.kernel / 2;
  kernels.parallel_for(full.shape.kv_heads, [&](int head) {
    const float* mass = mass_.data() + static_cast<size_t>(head) * static_cast<size_t>(tokens);
    float* score = scores.data() + static_cast<size_t>(head) * static_cast<size_t>(tokens);
    for (int token = 0; token < tokens; ++token) {
      float sum = 0;
      for (int i = std::max(0, token - reach); i <= std::min(tokens - 1, token + reach); ++i) {
        sum += mass[i];
      }
      score[token] = token >= tokens - options_.window ? INFINITY : sum;
    }
  });
}

}  // namespace vericache
