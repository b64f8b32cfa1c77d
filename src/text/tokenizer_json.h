// Reading of tokenizer.json and tokenizer_config.json into the parts of a Tokenizer.
// Pure functions, any thread.
#pragma once

#include <string_view>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/decoder.h"
#include "text/normalizer.h"
#include "text/pre_tokenizer.h"

namespace vericache {

struct TokenizerParts {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  AddedTokens added;
  Decoder decoder;
  std::vector<TokenId> before, after;  // what the post-processor adds
};

// Throws Error that names what is broken or not supported, and what is supported.
TokenizerParts read_tokenizer(std::string_view tokenizer_json);

// add_bos_token and add_eos_token, where they are given, decide over the post-processor, as they do in transformers.
void apply_tokenizer_config(std::string_view tokenizer_config_json, TokenizerParts& parts);

}  // namespace vericache
