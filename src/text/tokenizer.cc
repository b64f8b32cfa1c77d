#include "text/tokenizer.h"

#include <algorithm>
#include <fstream>

#include "base/error.h"
#include "text/tokenizer_json.h"
#include "text/utf8.h"

namespace vericache {
namespace {

constexpr uintmax_t kMaxFileBytes = uintmax_t{256} << 20;
constexpr size_t kMaxTextBytes = size_t{1} << 30;  // positions in a word are 32 bits wide

std::string read_file(const std::filesystem::path& path) {
  std::error_code failed;
  const uintmax_t bytes = std::filesystem::file_size(path, failed);
  std::ifstream in(path, std::ios::binary);
  if (failed || !in) throw Error("{}: cannot be read", path.string());
  if (bytes > kMaxFileBytes) {
    throw Error("{}: {} bytes; at most {} are supported", path.string(), bytes, kMaxFileBytes);
  }
  std::string text(static_cast<size_t>(bytes), '\0');
  in.read(text.data(), static_cast<std::streamsize>(bytes));
  if (in.gcount() != static_cast<std::streamsize>(bytes)) throw Error("{}: cannot be read to its end", path.string());
  return text;
}

}  // namespace

Tokenizer Tokenizer::load(const std::filesystem::path& model_dir) {
  const std::filesystem::path file = model_dir / "tokenizer.json";
  if (!std::filesystem::exists(file)) {
    throw Error(
        "{}: there is no tokenizer.json; save the tokenizer in the Hugging Face tokenizers format "
        "(AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        model_dir.string());
  }
  const std::filesystem::path config = model_dir / "tokenizer_config.json";
  const std::string config_json = std::filesystem::exists(config) ? read_file(config) : std::string();
  try {
    auto parts = std::make_shared<TokenizerParts>(read_tokenizer(read_file(file)));
    if (!config_json.empty()) apply_tokenizer_config(config_json, *parts);
    return Tokenizer(std::move(parts));
  } catch (const Error& error) {
    throw Error("{}: {}", model_dir.string(), error.what());
  }
}

Tokenizer Tokenizer::parse(std::string_view tokenizer_json) {
  return Tokenizer(std::make_shared<const TokenizerParts>(read_tokenizer(tokenizer_json)));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool add_special) const {
  if (text.size() > kMaxTextBytes) {
    throw Error("a text of {} bytes; at most {} can be tokenized at once", text.size(), kMaxTextBytes);
  }
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != std::string_view::npos) {
    throw Error("the text is not UTF-8: byte 0x{:02X} at offset {}; convert it to UTF-8",
                static_cast<unsigned>(static_cast<uint8_t>(text[invalid])), invalid);
  }
  TextArena arena;
  std::vector<Piece> pieces = parts_->added.extract(text, parts_->normalizer, arena);
  parts_->pre_tokenizer.apply(pieces, arena);

  std::vector<TokenId> ids;
  if (add_special) ids = parts_->before;
  BpeScratch scratch;
  for (const Piece& piece : pieces) {
    if (piece.token != kNoToken) {
      ids.push_back(piece.token);
    } else {
      parts_->bpe.encode(piece.text, scratch, ids);
    }
  }
  if (add_special) ids.insert(ids.end(), parts_->after.begin(), parts_->after.end());
  return ids;
}

std::optional<std::string_view> Tokenizer::token_string(TokenId id, bool skip_special) const {
  if (const auto form = parts_->added.form_of(id)) {
    if (skip_special && parts_->added.skipped(id)) return std::nullopt;
    return form;
  }
  return parts_->bpe.token_of(id);
}

const Decoder& Tokenizer::decoder() const {
  return parts_->decoder;
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  std::string out;
  DecoderStream stream(parts_->decoder);
  for (const TokenId id : ids) {
    if (const auto token = token_string(id, skip_special)) stream.push(*token, out);
  }
  stream.flush(out);
  return out;
}

int Tokenizer::vocab_size() const {
  return std::max(parts_->bpe.end_id(), parts_->added.end_id());
}

bool Tokenizer::is_special(TokenId id) const {
  const AddedToken* token = parts_->added.find(id);
  return token != nullptr && token->special;
}

std::optional<TokenId> Tokenizer::token_id(std::string_view token) const {
  const auto added = parts_->added.id_of(token);
  return added ? added : parts_->bpe.id_of(token);
}

std::string_view Tokenizer::kind() const {
  return parts_->decoder.join == Decoder::Join::kByteLevel ? "byte-level BPE" : "SentencePiece BPE";
}

}  // namespace vericache
