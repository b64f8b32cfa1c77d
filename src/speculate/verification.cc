#include "speculate/verification.h"

#include "base/check.h"

namespace vericache {

Verdict verify(std::span<const TokenId> drafted, std::span<const TokenId> chosen) {
  check(!chosen.empty() && (chosen.size() == drafted.size() || chosen.size() == drafted.size() + 1),
        "every draft has its judgement, and one token may be left over");
  for (size_t i = 0; i < drafted.size(); ++i) {
    if (chosen[i] != drafted[i]) {
      return {static_cast<int>(i), chosen[i]};
    }
  }
  Verdict verdict{static_cast<int>(drafted.size()), {}};
  if (chosen.size() > drafted.size()) {
    verdict.next = chosen.back();
  }
  return verdict;
}

}  // namespace vericache
