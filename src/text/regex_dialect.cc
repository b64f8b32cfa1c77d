#include "text/regex_dialect.h"

#include <cctype>
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"

namespace vericache {
namespace {

constexpr std::string_view kSupported =
    "literals, | ( ) (?: ) (?i: ) (?> ) lookarounds, classes without nesting or &&, . \\s \\S \\d \\r \\n \\t \\f "
    "\\p{..} \\P{..}, quantifiers ? * + {n} {n,m} with lazy ? or possessive + after ? * +";

constexpr size_t kMaxPatternBytes = 1 << 16;

class Translation {
 public:
  Translation(std::string_view pattern, std::string_view where) : in_(pattern), where_(where) {}

  std::string run() {
    if (in_.size() > kMaxPatternBytes) {
      throw Error("{}: a regular expression of {} bytes; at most {} are supported", where_, in_.size(),
                  kMaxPatternBytes);
    }
    while (pos_ < in_.size()) {
      step();
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view construct) const {
    throw Error("{}: '{}' at byte {} of the regular expression '{}' is not supported; supported: {}", where_, construct,
                pos_, in_, kSupported);
  }

  bool at(std::string_view token) const { return in_.substr(pos_).starts_with(token); }

  void copy(size_t bytes) {
    out_ += in_.substr(pos_, bytes);
    pos_ += bytes;
  }

  bool caseless() const { return !caseless_.empty() && caseless_.back(); }

  void step() {
    switch (in_[pos_]) {
      case '\\':
        return escape();
      case '[':
        return char_class();
      case '(':
        return open_group();
      case ')':
        if (!caseless_.empty()) caseless_.pop_back();
        return copy(1);
      case '{':
        return interval();
      case '.':
        out_ += "[^\\n]";
        ++pos_;
        return;
      case '^':
      case '$':
        refuse(in_.substr(pos_, 1));
      default:
        refuse_folding_pair();
        return copy(1);
    }
  }

  // Without case, Oniguruma lets one character stand for two letters (ß for ss, ﬁ for fi); PCRE2 does not.
  void refuse_folding_pair() const {
    if (!caseless()) return;
    if (static_cast<uint8_t>(in_[pos_]) >= 0x80) refuse("a caseless character beyond ASCII");
    std::string pair;
    for (const char c : in_.substr(pos_, 2)) {
      pair += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
    for (const std::string_view folding : {"ss", "ff", "fi", "fl", "st"}) {
      if (pair == folding) refuse(folding);
    }
  }

  void open_group() {
    constexpr std::string_view kOpeners[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    if (at("(?i:")) {
      caseless_.push_back(true);
      return copy(4);
    }
    const bool inherited = caseless();
    for (const std::string_view opener : kOpeners) {
      if (at(opener)) {
        caseless_.push_back(inherited);
        return copy(opener.size());
      }
    }
    if (at("(?") || at("(*")) refuse(in_.substr(pos_, 3));
    caseless_.push_back(inherited);
    copy(1);
  }

  // {n} {n,} {n,m}; what may follow (lazy, possessive) means something else in Oniguruma.
  void interval() {
    size_t end = pos_ + 1;
    const auto digits = [&] {
      const size_t begin = end;
      while (end < in_.size() && std::isdigit(static_cast<unsigned char>(in_[end]))) ++end;
      return end > begin;
    };
    if (!digits()) refuse("{");
    if (end < in_.size() && in_[end] == ',') {
      ++end;
      digits();
    }
    if (end >= in_.size() || in_[end] != '}') refuse("{");
    ++end;
    if (end < in_.size() && (in_[end] == '?' || in_[end] == '+')) refuse(in_.substr(pos_, end + 1 - pos_));
    copy(end - pos_);
  }

  // Reads "\p{Name}" or "\P{Name}" at pos_ and moves behind it.
  std::string property() {
    const size_t close = in_.find('}', pos_);
    if (pos_ + 2 >= in_.size() || in_[pos_ + 2] != '{' || close == std::string_view::npos) refuse(in_.substr(pos_, 2));
    const std::string_view name = in_.substr(pos_ + 3, close - pos_ - 3);
    std::string inside = property_class(name);
    if (inside.empty()) {
      throw Error("{}: the property '{}' in the regular expression '{}' is not supported; supported: {}", where_,
                  in_.substr(pos_, close + 1 - pos_), in_, kSupportedProperties);
    }
    if (caseless()) refuse("a property without case");
    pos_ = close + 1;
    return inside;
  }

  // True when the escape at pos_ stands for one plain character, which is then copied.
  bool plain_escape() {
    if (pos_ + 1 >= in_.size()) refuse("\\ at the end");
    const char c = in_[pos_ + 1];
    const bool plain = c == 'r' || c == 'n' || c == 't' || c == 'f' || std::ispunct(static_cast<unsigned char>(c)) != 0;
    if (plain) copy(2);
    return plain;
  }

  void escape() {
    if (plain_escape()) return;
    const char c = in_[pos_ + 1];
    if (c == 'p' || c == 'P') {
      const std::string inside = property();
      out_ += (c == 'p' ? "[" : "[^") + inside + "]";
    } else if (c == 's' || c == 'S') {
      out_ += (c == 's' ? "[" : "[^") + white_space_class() + "]";
      pos_ += 2;
    } else if (c == 'd') {
      out_ += "[" + property_class("Nd") + "]";
      pos_ += 2;
    } else {
      refuse(in_.substr(pos_, 2));
    }
  }

  void class_escape() {
    if (plain_escape()) return;
    const char c = in_[pos_ + 1];
    if (c == 'p') {
      out_ += property();
    } else if (c == 's' || c == 'S') {
      out_ += c == 's' ? white_space_class() : not_white_space_class();
      pos_ += 2;
    } else if (c == 'd') {
      out_ += property_class("Nd");
      pos_ += 2;
    } else {
      refuse(in_.substr(pos_, 2));
    }
  }

  void char_class() {
    const size_t start = pos_;
    copy(1);
    if (at("^")) copy(1);
    if (at("]")) refuse("]");
    while (pos_ < in_.size() && in_[pos_] != ']') {
      if (in_[pos_] == '[' || at("&&")) refuse(in_.substr(pos_, at("&&") ? 2 : 1));
      if (caseless() && static_cast<uint8_t>(in_[pos_]) >= 0x80) refuse("a caseless character beyond ASCII");
      if (in_[pos_] == '\\') {
        class_escape();
      } else {
        copy(1);
      }
    }
    if (pos_ >= in_.size()) {
      pos_ = start;
      refuse("[");
    }
    copy(1);
  }

  std::string_view in_;
  std::string_view where_;
  size_t pos_ = 0;
  std::string out_;
  std::vector<bool> caseless_;  // one per open group
};

}  // namespace

std::string to_pcre2(std::string_view pattern, std::string_view where) {
  return Translation(pattern, where).run();
}

}  // namespace vericache
