// Sequence: one request under way: its tokens, its drafts, and its KV in all its places. Owned and changed by the
// engine's thread.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "compress/compressor.h"
#include "engine/engine.h"
#include "kv/full_kv.h"
#include "kv/resident.h"
#include "kv/tail.h"
#include "speculate/horizon.h"

namespace vericache {

//  position   0 ......... folded ......... verified ... tokens.size() ... + drafted
//             | resident  | tail: verified KV | tail: drafted KV        |
//  full KV    0 ..... stored (host) | tail    |
//
// verified = tokens.size() - 1 while decoding: the last decided token is fed by the next pass. folded and stored are
// multiples of 64.
struct Sequence {
  SeqId id = 0;
  Request request;
  int prompt_tokens = 0;
  int max_tokens = 0;           // decided tokens at most, within the context
  std::vector<TokenId> tokens;  // prompt and decided
  int drafted = 0;              // tokens drafted and not judged yet; their ids stand on the board
  int drafts_done = 0;          // of them, those whose draft step is known to be done
  int draft_run = 0;            // counts refusals: a step that began before one drafts nothing any more
  double chance = 1;            // that those all stand
  Mark last_draft = 0;          // of its last draft step, draft lane
  Mark tail_changed = 0;        // draft lane: behind the last work on its tail and tables
  TokenId* board = nullptr;     // tokens by position, decided and drafted: host memory that the device reaches
  float* margins = nullptr;     // of drafts, by position, beside it
  int verified = 0;             // tokens whose full KV is computed
  int folded = 0;               // tokens that the resident part stands for
  int replay_tokens = 0;        // of its context, to be replayed before it drafts; 0 = none
  int replayed = 0;             // of them
  int storing = 0;              // pages handed to the wire for the host tier
  bool in_pass = false;
  int pass_end = 0;  // behind the last row of the pass that computes it now; 0 = none does
  bool cancelled = false;
  std::optional<FinishReason> finish;
  int restarts = 0;  // since stored pages last came back intact and decided a token

  std::unique_ptr<Tail> tail;
  std::unique_ptr<ResidentKv> resident;  // null in full-KV streaming mode
  std::unique_ptr<FullKv> full;          // null when the full KV stays on the device
  std::byte* index_memory = nullptr;     // tables of tail and resident part in device memory, given back at the end
  std::byte* query_memory = nullptr;     // the rings of the last queries; null where the compressor wants none
  int queries_from = 0;                  // position of the oldest row that the rings hold
  Notes notes{};                         // of layer 0, where the compressor keeps any; `observed` is that of all layers
  size_t notes_bytes = 0;                // from one layer to the next
  int report_values = 0;
  Horizon horizon;
  SequenceStats stats;

  explicit Sequence(const Horizon& policy) : horizon(policy) {}

  int decided() const { return static_cast<int>(tokens.size()) - prompt_tokens; }
  int backlog() const { return static_cast<int>(tokens.size()) - verified; }
  bool replays() const { return replayed < replay_tokens; }
  // Its full KV has no room outside the device, and waits for it.
  bool evicted() const { return full && full->extents() == 0; }
  // Drafts beyond this many could not be of use: the token after them is the last.
  int useful_drafts() const { return max_tokens - decided() - 1; }

  // Attention of a draft: resident + tail.
  LayerKv draft_view(int layer) const { return {resident->layer(layer).view(), tail->view(layer, folded), folded}; }
  // A verification of its drafts is due.
  bool ready() const {
    return chance < horizon.least_chance() || drafted >= std::min(horizon.reach(), useful_drafts());
  }
  void forget_drafts() {
    drafted = drafts_done = 0;
    chance = 1;
    ++draft_run;
  }
  void restart();  // forgets all KV; the tokens stay
};

}  // namespace vericache
