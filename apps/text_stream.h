// TextStream: generated tokens as text for a reader, holding back what may become a stop string. One sequence, one
// thread.
#pragma once

#include <string>
#include <vector>

#include "base/token.h"
#include "text/detokenizer.h"
#include "text/stop_strings.h"
#include "text/tokenizer.h"

namespace vericache {

class TextStream {
 public:
  // An end token closes the text and is not shown.
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop_strings, std::vector<TokenId> end_tokens);

  // Text that is now safe to show, maybe none. After stopped() the rest is ignored.
  std::string push(TokenId token);
  // What was held back, when the sequence ends by itself.
  std::string flush();
  bool stopped() const { return stop_strings_.stopped(); }  // a stop string is complete

 private:
  Detokenizer detokenizer_;
  StopStrings stop_strings_;
  std::vector<TokenId> end_tokens_;
};

}  // namespace vericache
