// Detokenizer: turns one stream of token ids into text, as early as it is certain and never half a character.
// One thread at a time; each stream has its own.
#pragma once

#include <string>

#include "base/token.h"
#include "text/decoder.h"
#include "text/tokenizer.h"

namespace vericache {

class Detokenizer {
 public:
  explicit Detokenizer(Tokenizer tokenizer, bool skip_special = false);

  // The text that is certain now. All results of push() and the one of flush(), put together, are what
  // Tokenizer::decode() gives for all the ids. Ids that the tokenizer does not have give nothing.
  std::string push(TokenId id);
  // The end of the stream: what was held back, U+FFFD for an incomplete character. Then starts afresh.
  std::string flush();

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  DecoderStream stream_;
};

}  // namespace vericache
