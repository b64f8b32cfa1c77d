#include "text/added_tokens.h"

#include <algorithm>

#include "base/error.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace vericache {
namespace {

// Behind the white space that starts at `pos`.
size_t white_space_end(std::string_view text, size_t pos) {
  while (pos < text.size()) {
    size_t next = pos;
    if (!is_white_space(next_code_point(text, next))) break;
    pos = next;
  }
  return pos;
}

// Start of the white space that ends at `pos`, not before `floor`.
size_t white_space_begin(std::string_view text, size_t pos, size_t floor) {
  while (pos > floor) {
    const size_t before = previous_boundary(text, pos);
    size_t at = before;
    if (!is_white_space(next_code_point(text, at))) break;
    pos = before;
  }
  return std::max(pos, floor);
}

}  // namespace

std::optional<uint32_t> StringTrie::child(uint32_t node, uint8_t byte) const {
  for (const auto& [label, next] : nodes_[node].children) {
    if (label == byte) return next;
  }
  return std::nullopt;
}

bool StringTrie::add(std::string_view key, int value) {
  uint32_t node = 0;
  for (const char c : key) {
    const uint8_t byte = static_cast<uint8_t>(c);
    std::optional<uint32_t> next = child(node, byte);
    if (!next) {
      next = static_cast<uint32_t>(nodes_.size());
      nodes_[node].children.emplace_back(byte, *next);
      nodes_.emplace_back();
    }
    node = *next;
  }
  if (node == 0 || nodes_[node].value >= 0) return false;
  nodes_[node].value = value;
  starts_[static_cast<uint8_t>(key[0])] = true;
  return true;
}

std::optional<StringTrie::Found> StringTrie::find(std::string_view text, size_t& pos) const {
  for (; pos < text.size(); ++pos) {
    if (!starts_[static_cast<uint8_t>(text[pos])]) continue;
    std::optional<Found> longest;
    uint32_t node = 0;
    for (size_t end = pos; end < text.size();) {
      const std::optional<uint32_t> next = child(node, static_cast<uint8_t>(text[end]));
      if (!next) break;
      node = *next;
      ++end;
      if (nodes_[node].value >= 0) longest = Found{end - pos, nodes_[node].value};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Normalizer& normalizer) : tokens_(std::move(tokens)) {
  for (int i = 0; i < static_cast<int>(tokens_.size()); ++i) {
    const AddedToken& token = tokens_[i];
    forms_.push_back(token.normalized ? normalizer.apply(token.content) : token.content);
    StringTrie& trie = token.normalized ? normalized_ : raw_;
    if (!by_id_.emplace(token.id, i).second || !by_content_.emplace(token.content, i).second ||
        !trie.add(forms_.back(), i)) {
      throw Error(
          "tokenizer.json: added_tokens: '{}' (id {}) is empty once normalized, or has the text or the id of another",
          token.content, token.id);
    }
    end_id_ = std::max(end_id_, token.id + 1);
    if (token.single_word && !word_character_) word_character_ = Pattern::char_class(word_class(), "added_tokens");
  }
}

void AddedTokens::cut(const Piece& piece, const StringTrie& trie, std::vector<Piece>& out) const {
  const std::string_view text = piece.text;
  const auto emit = [&](size_t begin, size_t end, TokenId token) {
    if (begin < end) out.push_back({text.substr(begin, end - begin), token, piece.at_start && begin == 0});
  };
  size_t taken = 0;         // everything before this has gone to a piece
  size_t known_spaces = 0;  // white space is known to reach from `spaces_from` to here
  size_t spaces_from = 0;
  for (size_t pos = 0;;) {
    const std::optional<StringTrie::Found> found = trie.find(text, pos);
    if (!found) break;
    size_t begin = pos;
    size_t end = pos = pos + found->bytes;
    const AddedToken& token = tokens_[found->value];
    if (token.single_word) {
      const bool joins_left = begin > 0 && word_character_->matches_code_point(text, previous_boundary(text, begin));
      const bool joins_right = end < text.size() && word_character_->matches_code_point(text, end);
      if (joins_left || joins_right) continue;
    }
    if (token.lstrip) begin = std::max(taken, white_space_begin(text, begin, std::min(begin, taken)));
    if (token.rstrip) {
      if (end < spaces_from || end > known_spaces) {
        spaces_from = end;
        known_spaces = white_space_end(text, end);
      }
      end = known_spaces;
    }
    if (begin >= end) continue;  // it lies in the white space that the token before it took
    emit(taken, begin, kNoToken);
    emit(begin, end, token.id);
    taken = end;
  }
  emit(taken, text.size(), kNoToken);
}

std::vector<Piece> AddedTokens::extract(std::string_view text, const Normalizer& normalizer, TextArena& arena) const {
  std::vector<Piece> raw;
  cut({text, kNoToken, true}, raw_, raw);
  if (normalizer.empty() && normalized_.empty()) return raw;
  std::vector<Piece> out;
  for (Piece& piece : raw) {
    if (piece.token != kNoToken) {
      out.push_back(piece);
      continue;
    }
    if (!normalizer.empty()) piece.text = arena.keep(normalizer.apply(piece.text));
    cut(piece, normalized_, out);
  }
  return out;
}

const AddedToken* AddedTokens::find(TokenId id) const {
  const auto at = by_id_.find(id);
  return at == by_id_.end() ? nullptr : &tokens_[at->second];
}

std::optional<TokenId> AddedTokens::id_of(std::string_view content) const {
  const auto at = by_content_.find(std::string(content));
  return at == by_content_.end() ? std::nullopt : std::optional<TokenId>(tokens_[at->second].id);
}

std::optional<std::string_view> AddedTokens::form_of(TokenId id) const {
  const auto at = by_id_.find(id);
  return at == by_id_.end() ? std::nullopt : std::optional<std::string_view>(forms_[at->second]);
}

bool AddedTokens::skipped(TokenId id) const {
  const auto at = by_id_.find(id);
  if (at == by_id_.end()) return false;
  // The tokenizers library compares the form with the contents of the special tokens; a special token that the
  // normalizer changes is therefore not left out.
  const auto same = by_content_.find(forms_[at->second]);
  return same != by_content_.end() && tokens_[same->second].special;
}

}  // namespace vericache
