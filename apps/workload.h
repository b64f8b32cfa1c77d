// Workload: the prompts that check and bench decode: files, lines of JSON, or generated documents of a given length.
// Main thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/token.h"
#include "text/tokenizer.h"

namespace vericache {

// Prompts that are measured together; `context` is the length asked for, or that of the longest prompt.
struct PromptGroup {
  int context = 0;
  std::vector<std::vector<TokenId>> prompts;
  std::vector<std::string> names;  // of each prompt, for messages
  int longest() const;
};

// Documents of records with a request for tool calls (every third for an export), each of at most `context` tokens and
// close to it.
PromptGroup records_group(const Tokenizer& tokenizer, int context, int documents, uint64_t seed);
// The first `context` tokens of a text, the same for each of `copies` prompts.
PromptGroup text_group(const Tokenizer& tokenizer, const std::string& text, int context, int copies);

}  // namespace vericache
