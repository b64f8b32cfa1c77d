// Decoder: how token strings become text, and DecoderStream, the same done token by token.
// A Decoder is immutable, any thread; a DecoderStream belongs to one thread at a time and must not outlive its Decoder.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "text/utf8.h"

namespace vericache {

// What is done to each token by itself.
struct DecodeReplace {
  std::string pattern, content;
};
struct DecodeStrip {
  std::string content;  // one code point
  int start, stop;      // at most so many at either end
};
struct DecodeMetaspace {
  std::string replacement;  // one code point; a space in all tokens but the first, where it goes
  bool keep_first;          // there too a space
};

struct Decoder {
  enum class Join { kSpaces, kConcatenate, kByteLevel };

  std::vector<std::variant<DecodeReplace, DecodeStrip, DecodeMetaspace>> per_token;
  bool byte_fallback = false;    // runs of <0x..> tokens become the text that they encode
  Join join = Join::kSpaces;     // what the tokenizers library does without a decoder
  DecodeStrip whole{" ", 0, 0};  // of the whole text

  std::string token_text(std::string_view token, bool first) const;
};

// Text comes out as soon as no later token can change it.
class DecoderStream {
 public:
  explicit DecoderStream(const Decoder& decoder) : decoder_(&decoder) {}

  void push(std::string_view token, std::string& out);
  void flush(std::string& out);

 private:
  void end_byte_run(std::string& out);
  void strip_whole(std::string_view text, std::string& out);

  const Decoder* decoder_;
  bool first_ = true;
  Utf8Stream utf8_;       // byte level
  std::string byte_run_;  // byte fallback: all of it is text or all of it is U+FFFD
  int start_left_ = -1;   // how much may still be stripped at the start; -1: not asked yet
  int held_ = 0;          // code points that may turn out to be the end
};

}  // namespace vericache
