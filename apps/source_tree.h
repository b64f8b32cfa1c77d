// SourceTree: the source files of a directory, and documents that are cut from them: what a reader of a code base has
// before the cursor. Reads files; main thread.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/token.h"
#include "text/tokenizer.h"

namespace vericache {

class SourceTree {
 public:
  // A directory, or one file. Empty: the Python library of this machine, else src/ of the folder that one stands in.
  // Error, naming the flag, if there is no source in it.
  explicit SourceTree(const std::string& given);

  const std::filesystem::path& root() const { return root_; }
  size_t files() const { return files_.size(); }

  // Document `index` of `count`, of exactly `tokens` tokens: it begins with a file, and others follow in the order of
  // their paths; documents begin evenly spread over the tree. Error if the whole tree has fewer tokens.
  std::vector<TokenId> document(const Tokenizer& tokenizer, int tokens, int index, int count) const;

 private:
  std::filesystem::path root_;
  std::vector<std::filesystem::path> files_;  // sorted
};

}  // namespace vericache
