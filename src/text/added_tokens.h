// AddedTokens: tokens that are found in the text before anything is split.
// Immutable once made, any thread.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/token.h"
#include "text/normalizer.h"
#include "text/piece.h"

namespace vericache {

struct AddedToken {
  TokenId id = kNoToken;
  std::string content;
  bool single_word = false;  // not inside a word
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space behind it
  bool normalized = false;   // sought in the normalized text, in its normalized form
  bool special = false;
};

// Finds the longest of a set of strings that starts at a place.
class StringTrie {
 public:
  struct Found {
    size_t bytes;
    int value;
  };
  bool add(std::string_view key, int value);  // false: the key is there already
  bool empty() const { return nodes_.size() == 1; }
  // The first place at or after `pos` where a key starts; `pos` is moved there.
  std::optional<Found> find(std::string_view text, size_t& pos) const;

 private:
  struct Node {
    std::vector<std::pair<uint8_t, uint32_t>> children;
    int value = -1;
  };
  std::optional<uint32_t> child(uint32_t node, uint8_t byte) const;

  std::vector<Node> nodes_ = std::vector<Node>(1);
  std::array<bool, 256> starts_{};
};

class AddedTokens {
 public:
  AddedTokens() = default;
  // Throws Error when two tokens look the same in the text.
  AddedTokens(std::vector<AddedToken> tokens, const Normalizer& normalizer);

  // Cuts `text` at the tokens that are sought in the text as it came (normalized = false), normalizes what lies between
  // them and cuts that at the others.
  std::vector<Piece> extract(std::string_view text, const Normalizer& normalizer, TextArena& arena) const;

  const AddedToken* find(TokenId id) const;
  std::optional<TokenId> id_of(std::string_view content) const;
  // What decoding starts from: the form that is sought.
  std::optional<std::string_view> form_of(TokenId id) const;
  // Whether decode(skip_special = true) leaves this id out.
  bool skipped(TokenId id) const;
  TokenId end_id() const { return end_id_; }

 private:
  void cut(const Piece& piece, const StringTrie& trie, std::vector<Piece>& out) const;

  std::vector<AddedToken> tokens_;
  std::vector<std::string> forms_;  // as the tokens: content, or what the normalizer makes of it
  std::unordered_map<TokenId, int> by_id_;
  std::unordered_map<std::string, int> by_content_;
  StringTrie raw_;
  StringTrie normalized_;
  std::optional<Pattern> word_character_;
  TokenId end_id_ = 0;
};

}  // namespace vericache
