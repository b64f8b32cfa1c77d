// Verification: which drafted tokens the verified logits confirm, and the token that follows. Pure; safe from any
// thread.
#pragma once

#include <cstddef>
#include <span>

#include "speculate/sampling.h"

namespace vericache {

// Row i holds the logits that choose the token at `position + i`.
struct LogitsView {
  const float* data = nullptr;  // (rows, vocabulary)
  int rows = 0;
  int vocabulary = 0;
  std::span<const float> row(int i) const {
    return {data + static_cast<size_t>(i) * vocabulary, static_cast<size_t>(vocabulary)};
  }
};

// accepted: drafted tokens confirmed, in order, up to the first disagreement. next: what the verified logits choose
// after them.
struct Verdict {
  int accepted = 0;
  TokenId next = 0;
};

// drafted.size() < logits.rows; row i judges drafted[i]. `position` is that of drafted[0].
Verdict verify(std::span<const TokenId> drafted, const LogitsView& logits, const Sampling& sampling, int position);

}  // namespace vericache
