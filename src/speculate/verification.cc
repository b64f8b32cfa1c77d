#include "speculate/verification.h"

#include "base/check.h"

namespace vericache {

Verdict verify(std::span<const TokenId> drafted, const LogitsView& logits, const Sampling& sampling, int position) {
  check(logits.rows > 0 && drafted.size() < static_cast<size_t>(logits.rows),
        "verification needs a row more than drafts");
  const int drafts = static_cast<int>(drafted.size());
  for (int i = 0; i < drafts; ++i) {
    const TokenId token = choose(logits.row(i), sampling, position + i);
    if (token != drafted[static_cast<size_t>(i)]) {
      return {i, token};
    }
  }
  return {drafts, choose(logits.row(drafts), sampling, position + drafts)};
}

}  // namespace vericache
