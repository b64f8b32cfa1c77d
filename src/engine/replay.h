// Replay: which rows feed a context again, for compressors that score tokens by what repeating them looks at (KVzip,
// Kim et al. 2025, section 3.2: chunks of 2,048 tokens, each led in by the last 8 of the chunk before). Pure; any
// thread.
#pragma once

#include <algorithm>

namespace vericache {

inline constexpr int kReplayChunk = 2048;  // tokens of one pass, where it has room
inline constexpr int kReplayLead = 8;
// Rows stand behind the context, at positions that the model knows. With fewer than this many left there is no replay.
inline constexpr int kLeastReplayRoom = 64;

// Rows that the next pass may feed, the lead included: `replayed` of `tokens` tokens have had their turn, `room`
// positions are left behind the context.
inline int replay_rows(int replayed, int tokens, int room) {
  return std::min(std::min(kReplayChunk, tokens - replayed) + std::min(kReplayLead, replayed), room);
}

// Tokens [first, end) of the context are fed; those from `replayed` on for the first time.
struct ReplayChunk {
  int first = 0;
  int end = 0;
  int rows() const { return end - first; }
};

// Of `rows` rows (at least 1) at least half go on.
inline ReplayChunk replay_chunk(int replayed, int tokens, int rows) {
  const int lead = std::min({kReplayLead, replayed, rows / 2});
  return {replayed - lead, std::min(tokens, replayed + rows - lead)};
}

}  // namespace vericache
