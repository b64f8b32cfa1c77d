// Piece: a part of the text on its way to token ids, and the arena that keeps rewritten text alive.
// One thread.
#pragma once

#include <deque>
#include <string>
#include <string_view>

#include "base/token.h"

namespace vericache {

inline constexpr TokenId kNoToken = -1;

struct Piece {
  std::string_view text;
  TokenId token = kNoToken;  // an added token: already decided
  bool at_start = false;     // begins where the whole text begins
};

// Strings that do not move until the arena goes.
class TextArena {
 public:
  std::string_view keep(std::string text) { return strings_.emplace_back(std::move(text)); }

 private:
  std::deque<std::string> strings_;
};

}  // namespace vericache
