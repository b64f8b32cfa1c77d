#include "text/detokenizer.h"

#include <utility>

namespace vericache {

Detokenizer::Detokenizer(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special), stream_(tokenizer_.decoder()) {}

std::string Detokenizer::push(TokenId id) {
  std::string out;
  if (const auto token = tokenizer_.token_string(id, skip_special_)) {
    stream_.push(*token, out);
  }
  return out;
}

std::string Detokenizer::flush() {
  std::string out;
  stream_.flush(out);
  stream_ = DecoderStream(tokenizer_.decoder());
  return out;
}

}  // namespace vericache
