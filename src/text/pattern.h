// Pattern: what a text is split at or searched for: a literal or a regular expression (PCRE2, Unicode, JIT).
// Immutable once made; any number of threads may search with one pattern.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vericache {

struct Span {
  size_t begin, end;  // bytes, half-open
  bool is_match;
};

class Pattern {
 public:
  static Pattern literal(std::string text, std::string_view where);            // throws Error when empty
  static Pattern regex(std::string_view onig, std::string_view where);         // throws Error when not supported
  static Pattern char_class(std::string_view inside, std::string_view where);  // one character of a PCRE2 class

  // Cuts `text` (well-formed UTF-8) into matches and what lies between them; the spans cover the text in order. An
  // empty match is a span of its own unless it follows a match directly. Throws Error when a match needs more steps
  // than a sane pattern could.
  void cut(std::string_view text, std::vector<Span>& spans) const;

  // The same matches, each replaced by `replacement`. Throws Error when the result has more than `max_bytes`.
  std::string replace(std::string_view text, std::string_view replacement, size_t max_bytes) const;

  // Whether the code point that starts at `pos` is a match by itself.
  bool matches_code_point(std::string_view text, size_t pos) const;

 private:
  struct Compiled;
  static Pattern compile(const std::string& pcre2, std::string_view shown, std::string_view where);
  void cut_literal(std::string_view text, std::vector<Span>& spans) const;

  std::string literal_;
  std::shared_ptr<const Compiled> compiled_;
};

}  // namespace vericache
