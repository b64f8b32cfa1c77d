#include "text/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "text/utf8.h"

namespace vericache {
namespace {

constexpr TokenId kMaxId = 1 << 22;  // the largest published vocabularies have a quarter of a million
constexpr size_t kMaxMerges = 1 << 24;
constexpr char32_t kLowCharacters = 0x500;   // looked up in an array
constexpr size_t kMaxRememberedBytes = 256;  // longer words hardly repeat
constexpr uint64_t kNoPair = ~uint64_t{0};

uint64_t pair_key(TokenId left, TokenId right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

size_t slot_of(uint64_t pair, size_t mask) {
  return static_cast<size_t>((pair * 0x9E3779B97F4A7C15u) >> 32) & mask;
}

}  // namespace

Bpe::Bpe(const Vocabulary& vocabulary, const Merges& merges, BpeOptions options) : options_(std::move(options)) {
  TokenId end = 0;
  for (const auto& [token, id] : vocabulary) {
    if (id < 0 || id >= kMaxId) {
      throw Error("tokenizer.json: model.vocab: token '{}' has id {}; ids from 0 to {} are supported", token, id,
                  kMaxId - 1);
    }
    end = std::max(end, id + 1);
  }
  tokens_.resize(end);
  known_.resize(end);
  for (const auto& [token, id] : vocabulary) {
    if (known_[id]) {
      throw Error("tokenizer.json: model.vocab: '{}' and '{}' have the same id {}", tokens_[id], token, id);
    }
    known_[id] = true;
    tokens_[id] = token;
  }
  ids_.reserve(vocabulary.size());
  for (TokenId id = 0; id < end; ++id) {
    if (!known_[id]) continue;
    if (!ids_.emplace(tokens_[id], id).second) {
      throw Error("tokenizer.json: model.vocab: the token '{}' occurs twice", tokens_[id]);
    }
  }
  add_merges(merges);
  index_characters();
}

void Bpe::add_merges(const Merges& merges) {
  if (merges.size() > kMaxMerges) {
    throw Error("tokenizer.json: model.merges: {} merges; at most {} are supported", merges.size(), kMaxMerges);
  }
  const size_t slots = std::bit_ceil(2 * merges.size() + 2);
  merge_pairs_.assign(slots, kNoPair);
  merges_.resize(slots);
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const std::string& left = merges[rank].first;
    const std::string& right = merges[rank].second;
    const std::string merged = left + right;
    const auto required = [&](const std::string& token) {
      const std::optional<TokenId> id = id_of(token);
      if (!id) {
        throw Error("tokenizer.json: model.merges[{}] ('{}' '{}'): the token '{}' is not in model.vocab", rank, left,
                    right, token);
      }
      return *id;
    };
    const uint64_t pair = pair_key(required(left), required(right));
    size_t slot = slot_of(pair, slots - 1);
    while (merge_pairs_[slot] != kNoPair && merge_pairs_[slot] != pair) slot = (slot + 1) & (slots - 1);
    merge_pairs_[slot] = pair;  // a pair that is listed twice has its later rank
    merges_[slot] = {static_cast<uint32_t>(rank), required(merged)};
  }
}

void Bpe::index_characters() {
  low_characters_.assign(kLowCharacters, kNoToken);
  for (TokenId id = 0; id < end_id(); ++id) {
    if (!known_[id] || tokens_[id].empty()) continue;
    size_t pos = 0;
    const char32_t c = next_code_point(tokens_[id], pos);
    if (pos != tokens_[id].size()) continue;
    if (c < kLowCharacters) {
      low_characters_[c] = id;
    } else {
      high_characters_.emplace(c, id);
    }
  }
  byte_tokens_.assign(256, kNoToken);
  for (int byte = 0; byte < 256; ++byte) {
    byte_tokens_[byte] = id_of(fmt::format("<0x{:02X}>", byte)).value_or(kNoToken);
  }
}

std::optional<TokenId> Bpe::id_of(std::string_view token) const {
  const auto at = ids_.find(token);
  return at == ids_.end() ? std::nullopt : std::optional<TokenId>(at->second);
}

std::optional<std::string_view> Bpe::token_of(TokenId id) const {
  if (id < 0 || id >= end_id() || !known_[id]) return std::nullopt;
  return tokens_[id];
}

const Bpe::Merge* Bpe::find_merge(TokenId left, TokenId right) const {
  const uint64_t pair = pair_key(left, right);
  const size_t mask = merge_pairs_.size() - 1;
  for (size_t slot = slot_of(pair, mask); merge_pairs_[slot] != kNoPair; slot = (slot + 1) & mask) {
    if (merge_pairs_[slot] == pair) return &merges_[slot];
  }
  return nullptr;
}

TokenId Bpe::id_of_character(char32_t c) const {
  if (c < kLowCharacters) return low_characters_[c];
  const auto at = high_characters_.find(c);
  return at == high_characters_.end() ? kNoToken : at->second;
}

bool Bpe::spell_bytes(std::string_view character, BpeScratch& scratch) const {
  const auto id_of_byte = [&](char c) { return byte_tokens_[static_cast<uint8_t>(c)]; };
  if (std::any_of(character.begin(), character.end(), [&](char c) { return id_of_byte(c) == kNoToken; })) return false;
  for (const char c : character) scratch.symbols_.push_back({id_of_byte(c), 0, 0, true});
  return true;
}

void Bpe::spell(std::string_view word, BpeScratch& scratch) const {
  auto& symbols = scratch.symbols_;
  symbols.clear();
  // An unknown character waits until the next known one: that is where the tokenizers library puts it, even when tokens
  // of bytes come between.
  TokenId waiting = kNoToken;
  const auto release = [&] {
    if (waiting != kNoToken) symbols.push_back({waiting, 0, 0, true});
    waiting = kNoToken;
  };
  for (size_t pos = 0; pos < word.size();) {
    const size_t begin = pos;
    const TokenId id = id_of_character(next_code_point(word, pos));
    if (id != kNoToken) {
      release();
      symbols.push_back({id, 0, 0, true});
      continue;
    }
    if (options_.byte_fallback && spell_bytes(word.substr(begin, pos - begin), scratch)) continue;
    if (!options_.unknown_token) continue;  // without such a token the character is dropped
    const std::optional<TokenId> unknown = id_of(*options_.unknown_token);
    if (!unknown) {
      throw Error("the tokenizer has no token for '{}', and its unk_token '{}' is not in its vocabulary",
                  word.substr(begin, pos - begin), *options_.unknown_token);
    }
    if (!options_.fuse_unknown) release();
    waiting = *unknown;
  }
  release();
  for (size_t i = 0; i < symbols.size(); ++i) {
    symbols[i].previous = static_cast<int32_t>(i) - 1;
    symbols[i].next = i + 1 < symbols.size() ? static_cast<int32_t>(i) + 1 : -1;
  }
}

void Bpe::merge(BpeScratch& scratch) const {
  auto& symbols = scratch.symbols_;
  auto& heap = scratch.heap_;
  const auto later = [](const auto& a, const auto& b) { return a.order > b.order; };
  const auto candidate = [&](int32_t left) -> bool {
    const Merge* merge = find_merge(symbols[left].id, symbols[symbols[left].next].id);
    if (merge != nullptr)
      heap.push_back({static_cast<uint64_t>(merge->rank) << 32 | static_cast<uint32_t>(left), merge->merged});
    return merge != nullptr;
  };
  heap.clear();
  for (size_t i = 0; i + 1 < symbols.size(); ++i) candidate(static_cast<int32_t>(i));
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const BpeScratch::Candidate top = heap.back();
    heap.pop_back();
    const auto at = static_cast<int32_t>(static_cast<uint32_t>(top.order));
    auto& left = symbols[at];
    if (!left.alive || left.next < 0) continue;
    auto& right = symbols[left.next];
    // The pair may have changed since it was queued.
    const Merge* merge = find_merge(left.id, right.id);
    if (merge == nullptr || merge->merged != top.merged) continue;
    left.id = top.merged;
    left.next = right.next;
    right.alive = false;
    if (left.next >= 0) symbols[left.next].previous = at;
    if (left.previous >= 0 && candidate(left.previous)) std::push_heap(heap.begin(), heap.end(), later);
    if (left.next >= 0 && candidate(at)) std::push_heap(heap.begin(), heap.end(), later);
  }
}

void Bpe::encode_uncached(std::string_view word, BpeScratch& scratch, std::vector<TokenId>& ids) const {
  spell(word, scratch);
  merge(scratch);
  for (const auto& symbol : scratch.symbols_) {
    if (symbol.alive) ids.push_back(symbol.id);
  }
}

void Bpe::encode(std::string_view word, BpeScratch& scratch, std::vector<TokenId>& ids) const {
  if (options_.ignore_merges) {
    if (const std::optional<TokenId> id = id_of(word)) {
      ids.push_back(*id);
      return;
    }
  }
  if (word.size() > kMaxRememberedBytes) return encode_uncached(word, scratch, ids);
  const auto [at, fresh] = scratch.words_.try_emplace(word);
  auto& word_ids = scratch.word_ids_;
  if (fresh) {
    at->second.begin = word_ids.size();
    encode_uncached(word, scratch, word_ids);
    at->second.end = word_ids.size();
  }
  ids.insert(ids.end(), word_ids.begin() + static_cast<ptrdiff_t>(at->second.begin),
             word_ids.begin() + static_cast<ptrdiff_t>(at->second.end));
}

}  // namespace vericache
