#include "workload.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "prompts.h"
#include "text/records.h"

namespace vericache {

int PromptGroup::longest() const {
  size_t longest = 0;
  for (const std::vector<TokenId>& prompt : prompts) {
    longest = std::max(longest, prompt.size());
  }
  return static_cast<int>(longest);
}

PromptGroup records_group(const Tokenizer& tokenizer, int context, int documents, uint64_t seed) {
  PromptGroup group;
  group.context = context;
  for (int i = 0; i < documents; ++i) {
    const uint64_t document_seed = seed + static_cast<uint64_t>(i);
    const RecordsTask task = i % 3 == 2 ? RecordsTask::export_json : RecordsTask::calls;
    const auto count = [&](std::string_view text) { return static_cast<int>(tokenizer.encode(text, true).size()); };
    const RecordsRequest request = records_request_near(document_seed, task, context, count);
    group.prompts.push_back(tokenizer.encode(request.prompt, true));
    group.names.push_back(fmt::format("document {} of seed {}", i, document_seed));
  }
  return group;
}

PromptGroup text_group(const Tokenizer& tokenizer, const std::string& text, int context, int copies) {
  std::vector<TokenId> ids = encode_prompt(tokenizer, text, "the text");
  if (static_cast<int>(ids.size()) < context) {
    throw Error("the text has {} tokens, too few for a context of {}: give a longer one or lower --contexts",
                ids.size(), context);
  }
  PromptGroup group;
  group.context = context;
  const size_t length = static_cast<size_t>(context);
  const size_t step = copies > 1 ? std::min<size_t>(1024, (ids.size() - length) / static_cast<size_t>(copies - 1)) : 0;
  for (size_t i = 0; i < static_cast<size_t>(copies); ++i) {
    const auto begin = ids.begin() + static_cast<ptrdiff_t>(i * step);
    group.prompts.emplace_back(begin, begin + static_cast<ptrdiff_t>(length));
    group.names.push_back(fmt::format("the text from token {}", i * step));
  }
  return group;
}

}  // namespace vericache
