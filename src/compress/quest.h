// Quest: keeps every token, page by page, in some format, and lets a draft step read only the pages whose keys may give
// its queries the largest scores (Tang et al. 2024, sections 3.2 and 3.3): pages carry the smallest and the largest of
// every key channel, and the choice is made anew by draft attention itself. It saves reading, not memory. A page has
// bounds for each 32 of its tokens and counts as the largest of them. Query heads that share a KV head share its pages:
// a page counts as the sum over them, in which what a head adds to all pages alike does not matter.
// Called from the engine's thread, as compressor.h says.
#pragma once

#include <string>

#include "compress/paged.h"

namespace vericache {

struct QuestOptions {
  double budget = 0.2;   // of a head's resident pages a share (up to 1), or tokens (above 1); a page at least
  int dense_layers = 2;  // the first ones, whose attention is spread over everything: they read all pages
};

class Quest final : public PagedCompressor {
 public:
  Quest(const QuestOptions& options, const KvFormat& kept) : PagedCompressor(chosen(options, kept)) {}
  std::string name() const override;

 private:
  static KvFormat chosen(const QuestOptions& options, KvFormat kept) {
    kept.choice = {.bounded = true, .budget = options.budget, .dense_layers = options.dense_layers};
    return kept;
  }
};

}  // namespace vericache
