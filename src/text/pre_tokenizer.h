// PreTokenizer: cuts text into the words that BPE works on.
// Immutable once made, any thread.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "text/pattern.h"
#include "text/piece.h"

namespace vericache {

enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Split {
  Pattern pattern;
  SplitBehavior behavior;
  bool invert;  // what matches is what lies between the matches
};

struct ByteLevelSplit {
  bool add_prefix_space;
  bool use_regex;
  Pattern words;  // GPT-2's
};

struct Metaspace {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string replacement;  // one code point, usually U+2581
  Prepend prepend;
  bool split;
};

class PreTokenizer {
 public:
  using Step = std::variant<Split, ByteLevelSplit, Metaspace>;
  PreTokenizer() = default;
  explicit PreTokenizer(std::vector<Step> steps) : steps_(std::move(steps)) {}

  // Replaces every piece that is not a token yet by the pieces it is cut into; empty ones are left out.
  void apply(std::vector<Piece>& pieces, TextArena& arena) const;

 private:
  std::vector<Step> steps_;
};

extern const std::string_view kGpt2Words;  // the regular expression of ByteLevel with use_regex

}  // namespace vericache
