#include "text/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "base/check.h"
#include "base/error.h"
#include "text/regex_dialect.h"
#include "text/utf8.h"

namespace vericache {
namespace {

struct FreePcre2 {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  void operator()(pcre2_compile_context* p) const { pcre2_compile_context_free(p); }
};
template <typename T>
using Pcre2Ptr = std::unique_ptr<T, FreePcre2>;

std::string pcre2_message(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct Pattern::Compiled {
  Pcre2Ptr<pcre2_code> code;
  std::string shown;
  std::string where;
};

namespace {

// One search over one text: the limits scale with the text, because a run of white space that is given back character
// by character costs one step each.
class Search {
 public:
  Search(const pcre2_code* code, std::string_view shown, std::string_view where, std::string_view text)
      : code_(code),
        shown_(shown),
        where_(where),
        text_(text),
        found_(pcre2_match_data_create(1, nullptr)),
        limits_(pcre2_match_context_create(nullptr)) {
    check(found_ != nullptr && limits_ != nullptr, "PCRE2 is out of memory");
    const uint64_t steps = 10'000'000 + 16 * static_cast<uint64_t>(text.size());
    pcre2_set_match_limit(limits_.get(), static_cast<uint32_t>(std::min<uint64_t>(steps, UINT32_MAX)));
    const uint64_t heap_kib = 65'536 + static_cast<uint64_t>(text.size()) / 4;
    pcre2_set_heap_limit(limits_.get(), static_cast<uint32_t>(std::min<uint64_t>(heap_kib, UINT32_MAX)));
  }

  // The first match at or after `from`.
  std::optional<Span> find(size_t from, uint32_t options = 0) const {
    options |= PCRE2_NO_UTF_CHECK;  // the caller has checked; otherwise every search would walk the whole text
    int rc = match(from, options);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = match(from, options | PCRE2_NO_JIT);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return std::nullopt;
    if (rc < 0) {
      throw Error("{}: the regular expression '{}' fails at byte {} of a text of {} bytes ({}); use a simpler pattern",
                  where_, shown_, from, text_.size(), pcre2_message(rc));
    }
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(found_.get());
    return Span{bounds[0], std::max(bounds[0], bounds[1]), true};
  }

 private:
  int match(size_t from, uint32_t options) const {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text_.data()), text_.size(), from, options, found_.get(),
                       limits_.get());
  }

  const pcre2_code* code_;
  std::string_view shown_;
  std::string_view where_;
  std::string_view text_;
  Pcre2Ptr<pcre2_match_data> found_;
  Pcre2Ptr<pcre2_match_context> limits_;
};

void push_between(std::vector<Span>& spans, size_t begin, size_t end) {
  if (begin < end) spans.push_back({begin, end, false});
}

}  // namespace

Pattern Pattern::compile(const std::string& pcre2, std::string_view shown, std::string_view where) {
  const Pcre2Ptr<pcre2_compile_context> settings(pcre2_compile_context_create(nullptr));
  check(settings != nullptr, "PCRE2 is out of memory");
  pcre2_set_newline(settings.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(settings.get(), 100);
  int error = 0;
  PCRE2_SIZE offset = 0;
  Pcre2Ptr<pcre2_code> code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pcre2.data()), pcre2.size(),
                                          PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset,
                                          settings.get()));
  if (!code) {
    throw Error("{}: the regular expression '{}' does not compile: {}", where, shown, pcre2_message(error));
  }
  // Without JIT (a machine that forbids writable code pages) pcre2_match() interprets: slower, the same matches.
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  Pattern pattern;
  pattern.compiled_ =
      std::make_shared<const Compiled>(Compiled{std::move(code), std::string(shown), std::string(where)});
  return pattern;
}

Pattern Pattern::literal(std::string text, std::string_view where) {
  if (text.empty()) throw Error("{}: an empty pattern is not supported", where);
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

Pattern Pattern::regex(std::string_view onig, std::string_view where) {
  return compile(to_pcre2(onig, where), onig, where);
}

Pattern Pattern::char_class(std::string_view inside, std::string_view where) {
  return compile("[" + std::string(inside) + "]", inside, where);
}

void Pattern::cut_literal(std::string_view text, std::vector<Span>& spans) const {
  size_t behind = 0;
  for (size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, behind)) {
    push_between(spans, behind, at);
    behind = at + literal_.size();
    spans.push_back({at, behind, true});
  }
  push_between(spans, behind, text.size());
}

void Pattern::cut(std::string_view text, std::vector<Span>& spans) const {
  spans.clear();
  if (text.empty()) return;
  if (!compiled_) return cut_literal(text, spans);
  const Search search(compiled_->code.get(), compiled_->shown, compiled_->where, text);
  size_t behind = 0;
  size_t from = 0;
  std::optional<size_t> last_match_end;
  while (from <= text.size()) {
    const std::optional<Span> match = search.find(from);
    if (!match) break;
    if (match->begin == match->end && last_match_end == match->end) {
      if (from >= text.size()) break;
      next_code_point(text, from);
      continue;
    }
    push_between(spans, behind, match->begin);
    spans.push_back(*match);
    behind = from = match->end;
    last_match_end = match->end;
  }
  push_between(spans, behind, text.size());
}

std::string Pattern::replace(std::string_view text, std::string_view replacement, size_t max_bytes) const {
  std::vector<Span> spans;
  cut(text, spans);
  std::string out;
  out.reserve(text.size());
  for (const Span& span : spans) {
    out += span.is_match ? replacement : text.substr(span.begin, span.end - span.begin);
    if (out.size() > max_bytes) {
      throw Error("replacing by '{}' makes {} bytes of text longer than {} bytes", replacement.substr(0, 80),
                  text.size(), max_bytes);
    }
  }
  return out;
}

bool Pattern::matches_code_point(std::string_view text, size_t pos) const {
  size_t end = pos;
  next_code_point(text, end);
  const std::string_view one = text.substr(pos, end - pos);
  if (!compiled_) return one == literal_;
  return Search(compiled_->code.get(), compiled_->shown, compiled_->where, one).find(0).has_value();
}

}  // namespace vericache
