// Tokenizer: text to token ids and back, as a Hugging Face tokenizer.json says.
// Immutable and cheap to copy; const methods may be called from any number of threads at once.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/token.h"
#include "text/decoder.h"

namespace vericache {

struct TokenizerParts;

class Tokenizer {
 public:
  // Reads tokenizer.json of a model's directory, and of tokenizer_config.json, where there is one, add_bos_token and
  // add_eos_token. Throws Error for what is missing, broken or not supported.
  static Tokenizer load(const std::filesystem::path& model_dir);
  static Tokenizer parse(std::string_view tokenizer_json);

  // add_special: with what the post-processor adds, such as the beginning-of-text token. Throws Error, naming the byte,
  // when `text` is not UTF-8.
  std::vector<TokenId> encode(std::string_view text, bool add_special = false) const;

  // Ids that the tokenizer does not have are left out; skip_special leaves out special tokens too. Always UTF-8: U+FFFD
  // for bytes that are not.
  std::string decode(std::span<const TokenId> ids, bool skip_special = false) const;

  int vocab_size() const;  // one more than the largest id
  bool is_special(TokenId id) const;
  std::optional<TokenId> token_id(std::string_view token) const;
  std::string_view kind() const;  // "byte-level BPE" or "SentencePiece BPE"

  // For Detokenizer: what decoding starts from; nullopt when the id is left out.
  std::optional<std::string_view> token_string(TokenId id, bool skip_special) const;
  const Decoder& decoder() const;

 private:
  explicit Tokenizer(std::shared_ptr<const TokenizerParts> parts) : parts_(std::move(parts)) {}

  std::shared_ptr<const TokenizerParts> parts_;
};

}  // namespace vericache
