// Bpe: a vocabulary and its ordered merges (Sennrich et al. 2016, section 3.2). Immutable once made; encode() may be
// called from several threads, each with its own BpeScratch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/token.h"
#include "text/piece.h"

namespace vericache {

struct BpeOptions {
  bool byte_fallback = false;  // an unknown character becomes the tokens <0x..> of its bytes
  bool fuse_unknown = false;
  bool ignore_merges = false;  // a word of the vocabulary is that token, whatever the merges give
  std::optional<std::string> unknown_token;
};

// Working space of one encode() of a text, and the words it has seen: text repeats itself.
class BpeScratch {
 private:
  friend class Bpe;
  struct Symbol {
    TokenId id;
    int32_t previous, next;  // -1: none
    bool alive;
  };
  struct Candidate {
    uint64_t order;  // rank, then position: the smallest is merged first
    TokenId merged;
  };
  struct Word {
    size_t begin, end;  // in words_ids_
  };
  std::vector<Symbol> symbols_;
  std::vector<Candidate> heap_;
  std::unordered_map<std::string_view, Word> words_;
  std::vector<TokenId> word_ids_;
};

class Bpe {
 public:
  using Vocabulary = std::vector<std::pair<std::string, TokenId>>;
  using Merges = std::vector<std::pair<std::string, std::string>>;

  Bpe() = default;
  // Throws Error for ids that are negative, too large or used twice, and for merges whose tokens are not in the
  // vocabulary.
  Bpe(const Vocabulary& vocabulary, const Merges& merges, BpeOptions options);
  Bpe(Bpe&&) = default;
  Bpe& operator=(Bpe&&) = default;

  // Appends the ids of one word. `word` must stay alive as long as the scratch. O(n log n) in its length.
  void encode(std::string_view word, BpeScratch& scratch, std::vector<TokenId>& ids) const;

  std::optional<TokenId> id_of(std::string_view token) const;
  // The token's text; nullopt for an id that the vocabulary does not have.
  std::optional<std::string_view> token_of(TokenId id) const;
  size_t size() const { return ids_.size(); }                              // tokens
  TokenId end_id() const { return static_cast<TokenId>(tokens_.size()); }  // one behind the largest id

 private:
  struct Merge {
    uint32_t rank;
    TokenId merged;
  };

  void add_merges(const Merges& merges);
  void index_characters();
  const Merge* find_merge(TokenId left, TokenId right) const;
  TokenId id_of_character(char32_t c) const;
  void spell(std::string_view word, BpeScratch& scratch) const;
  bool spell_bytes(std::string_view character, BpeScratch& scratch) const;
  void merge(BpeScratch& scratch) const;
  void encode_uncached(std::string_view word, BpeScratch& scratch, std::vector<TokenId>& ids) const;

  BpeOptions options_;
  std::vector<std::string> tokens_;  // by id
  std::vector<bool> known_;          // by id
  std::unordered_map<std::string_view, TokenId> ids_;

  // Merges by pair: open addressing, a power of two of slots, at most half of them taken.
  std::vector<uint64_t> merge_pairs_;
  std::vector<Merge> merges_;

  std::vector<TokenId> low_characters_;  // by code point
  std::unordered_map<char32_t, TokenId> high_characters_;
  std::vector<TokenId> byte_tokens_;  // <0x00> to <0xFF>
};

}  // namespace vericache
