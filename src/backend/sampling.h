// Sampling: a token as a pure function of (logits, parameters, seed, position).
// Safe from any thread.
#pragma once

#include <cstdint>
#include <span>

#include "base/token.h"

namespace vericache {

struct Sampling {
  float temperature = 0;  // 0: arg-max
  int top_k = 0;          // 0: off
  float top_p = 1;        // 1: off; nucleus of the distribution after temperature and top-k (Holtzman et al. 2020)
  float min_p = 0;        // 0: off; tokens below min_p times the best probability are out (Nguyen et al. 2024)
  uint64_t seed = 0;
};

// Error naming the field and its range, if a parameter is out of it.
void validate(const Sampling& sampling);

// The token at absolute `position`, chosen from the logits of the position before it. Gumbel-max over the tokens that
// top-k, top-p and min-p leave: argmax(logit / temperature + gumbel(seed, position, token)); the noise is Philox4x32-10
// (Salmon et al. 2011) keyed by seed, counted by (position, token), so that a draft and its verification share it. Ties
// break to the lower token id, in the filters too. NaN counts as -inf; +inf wins; if nothing is above -inf the token is
// 0. The parameters are valid.
// margin, if wanted: how far the runner-up stands behind, in logits, kMostMargin at most: of what is maximised, times
// the temperature where there is one. So far the logits may move before another token is chosen. 0 if no logit is
// finite.
inline constexpr float kMostMargin = 8;
TokenId choose(std::span<const float> logits, const Sampling& sampling, int position, float* margin = nullptr);

}  // namespace vericache
