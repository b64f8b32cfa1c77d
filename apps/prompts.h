// Prompts: text from the command line, files or stdin, checked before any work is done with it. Pure but for reading
// files.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/token.h"
#include "text/tokenizer.h"

namespace vericache {

// Where one prompt comes from; at most one of text and file is given, neither means stdin.
struct PromptFlags {
  std::string text;
  bool text_given = false;
  std::string file;
};

// Error naming the source if it cannot be read, is empty, or is not UTF-8.
std::string read_prompt(const PromptFlags& flags);
std::string read_prompt_file(const std::string& path);

std::vector<TokenId> encode_prompt(const Tokenizer& tokenizer, std::string_view text, std::string_view source);

// One prompt a line: {"prompt": "..."} or {"ids": [...]}. Error naming the line.
std::vector<std::vector<TokenId>> read_prompt_lines(const std::string& path, const Tokenizer& tokenizer,
                                                    int vocabulary);
// JSON: a list of token ids. Error if it is anything else, is empty, or holds an id outside the vocabulary.
std::vector<TokenId> read_ids_file(const std::string& path, int vocabulary);

// Share of different n-grams of 8 tokens among all: 1 for text that never repeats itself, small for text that loops.
double distinct_8gram_share(std::span<const std::vector<TokenId>> texts);

}  // namespace vericache
