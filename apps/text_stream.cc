#include "text_stream.h"

#include <algorithm>
#include <utility>

namespace vericache {

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop_strings,
                       std::vector<TokenId> end_tokens)
    : detokenizer_(tokenizer), stop_strings_(std::move(stop_strings)), end_tokens_(std::move(end_tokens)) {}

std::string TextStream::push(TokenId token) {
  if (std::find(end_tokens_.begin(), end_tokens_.end(), token) != end_tokens_.end()) {
    return {};
  }
  return stop_strings_.push(detokenizer_.push(token));
}

std::string TextStream::flush() {
  std::string text = stop_strings_.push(detokenizer_.flush());
  return text + stop_strings_.flush();
}

}  // namespace vericache
