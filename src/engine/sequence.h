// Sequence: one request under way: its tokens, its drafts, and its KV in all its places. Owned and changed by the
// engine's thread.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/engine.h"
#include "kv/host_tier.h"
#include "kv/resident.h"
#include "kv/tail.h"
#include "speculate/horizon.h"

namespace vericache {

// The last queries of one layer, at consecutive positions, with their softmax denominators: what droppers choose by.
class QueryWindow {
 public:
  // memory: bytes(...) of device memory; capacity rows.
  QueryWindow(std::byte* memory, int capacity, int row_queries, int heads);
  static size_t bytes(int capacity, int row_queries, int heads);

  // Rows at `position` and on replace what stood there (a draft's verification was refused, say).
  void append(const bf16* q, const float* log_sum_exp, int rows, int position);
  void clear() { rows_ = 0; }
  Attended attended(int heads, float scale) const;

 private:
  bf16* q_;             // (capacity, row_queries)
  float* log_sum_exp_;  // (capacity, heads)
  int capacity_;
  int row_queries_;  // heads * key_dim
  int heads_;
  int rows_ = 0;
  int position_ = 0;  // of row 0
};

//  position   0 ......... folded ......... verified ... tokens.size() ... + drafted.size()
//             | resident  | tail: verified KV | tail: drafted KV        |
//  full KV    0 ..... stored (host) | tail    |
//
// verified = tokens.size() - 1 while decoding: the last decided token is fed by the next pass. folded and stored are
// multiples of 64.
struct Sequence {
  SeqId id = 0;
  Request request;
  int prompt_tokens = 0;
  int max_tokens = 0;             // decided tokens at most, within the context
  std::vector<TokenId> tokens;    // prompt and decided
  std::vector<TokenId> drafted;   // not judged yet
  int verified = 0;               // tokens whose full KV is computed
  int folded = 0;                 // tokens that the resident part stands for
  std::vector<int> resident_end;  // (layers): the same, per layer, while a pass moves from layer to layer
  int storing = 0;                // pages handed to the wire for the host tier
  bool in_pass = false;
  int pass_end = 0;  // behind the last row of the pass that computes it now; 0 = none does
  bool cancelled = false;
  std::optional<FinishReason> finish;
  int restarts = 0;  // since stored pages last came back intact and decided a token

  std::unique_ptr<Tail> tail;
  std::unique_ptr<ResidentKv> resident;  // null in full-KV streaming mode
  std::unique_ptr<FullKv> full;          // null when the full KV stays on the device
  std::byte* query_memory = nullptr;     // the windows' block, given back at the end
  std::vector<QueryWindow> windows;      // (layers), empty where the compressor wants none
  Horizon horizon;
  SequenceStats stats;

  explicit Sequence(const Horizon& policy) : horizon(policy) {}

  int decided() const { return static_cast<int>(tokens.size()) - prompt_tokens; }
  int backlog() const { return static_cast<int>(tokens.size()) - verified; }
  // Drafts beyond this many could not be of use: the token after them is the last.
  int useful_drafts() const { return max_tokens - decided() - 1; }

  // Attention of a draft: resident + tail.
  LayerKv draft_view(int layer) const {
    const int end = resident_end[static_cast<size_t>(layer)];
    return {resident->layer(layer).view(), tail->view(layer, end), end};
  }
  void restart();       // forgets all KV; the tokens stay
  void release_tail();  // gives back the page sets that are folded and stored; only while it stands in no pass
};

}  // namespace vericache
