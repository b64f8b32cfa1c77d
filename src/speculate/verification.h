// Verification: which drafted tokens the verified logits confirm, and the token that follows. Pure; safe from any
// thread.
#pragma once

#include <optional>
#include <span>

#include "base/token.h"

namespace vericache {

// accepted: drafted tokens confirmed, in order, up to the first disagreement. next: what the verified logits choose
// after them; empty where every choice confirmed a draft and none is left over.
struct Verdict {
  int accepted = 0;
  std::optional<TokenId> next;
};

// chosen[i] is what verified logits choose at the place of drafted[i]. There are as many as drafts, or one more.
Verdict verify(std::span<const TokenId> drafted, std::span<const TokenId> chosen);

}  // namespace vericache
