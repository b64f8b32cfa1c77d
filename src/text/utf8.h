// UTF-8: validation, code points, and a streaming decoder that turns bytes into text with U+FFFD for what is not UTF-8.
// Pure functions and values; a Utf8Stream belongs to one thread at a time.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace vericache {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// Byte offset of the first ill-formed sequence; npos when the whole text is well-formed.
size_t find_invalid_utf8(std::string_view text);

// The code point at `pos`, which is moved behind it. `text` must be well-formed and `pos` a boundary before the end.
char32_t next_code_point(std::string_view text, size_t& pos);

// Start of the code point that ends at `pos` (pos > 0, a boundary of well-formed text).
size_t previous_boundary(std::string_view text, size_t pos);

void append_utf8(std::string& out, char32_t code_point);

// Unicode White_Space.
bool is_white_space(char32_t c);

// Bytes in, well-formed text out; each maximal ill-formed part becomes one U+FFFD (Unicode 15, section 3.9).
// A sequence that may still be completed is held back until it is, or until flush().
class Utf8Stream {
 public:
  void push(std::string_view bytes, std::string& out);
  void flush(std::string& out);

 private:
  char held_[4] = {};
  int held_bytes_ = 0;
};

}  // namespace vericache
