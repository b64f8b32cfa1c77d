// Eval tasks: what `eval` asks of a model, and whether an answer is right. Reads source files for the code workload;
// main thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/token.h"
#include "source_tree.h"
#include "text/tokenizer.h"

namespace vericache {

struct EvalPrompt {
  std::vector<TokenId> ids;
  std::string expected;            // empty: nobody knows what is right, as after code
  std::vector<std::string> items;  // of a right answer
  bool ordered = true;             // it is right only as it is expected; else it is the items, in any order
  int max_tokens = 0;
};

// Prompts of one workload at one length.
struct EvalSet {
  std::string workload;
  int context = 0;
  std::vector<EvalPrompt> prompts;
  bool has_answers() const { return !prompts.front().expected.empty(); }
  int longest() const;  // prompt and output
};

struct EvalLengths {
  int context = 2048;
  int documents = 4;
  int code_tokens = 320;     // decoded after code, whatever comes
  int answer_tokens = 1024;  // at most; an answer may be a little longer than the right one
};

// "code", "calls", "export", "needle", ...: one line about each.
struct EvalWorkload {
  std::string_view name;
  std::string_view about;
};
const std::vector<EvalWorkload>& eval_workloads();

// Document i is drawn with seed + i. `tree` is read by "code" alone and may be null without it.
EvalSet make_eval_set(std::string_view workload, const EvalLengths& lengths, uint64_t seed, const Tokenizer& tokenizer,
                      const SourceTree* tree);

struct Grade {
  bool right = false;
  double items = 0;  // share of the items that are in the answer
};
Grade grade(const EvalPrompt& prompt, std::string_view answer);

}  // namespace vericache
