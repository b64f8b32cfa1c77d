// FullPass: one forward pass over full + tail for rows of several sequences: prefill chunks, verifications and plain
// decoding are all this. It runs layer by layer behind the wire. Owned by the engine's thread.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "compress/compressor.h"
#include "compress/key_rounding.h"
#include "engine/replay.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "kv/wire.h"
#include "model/transformer.h"

namespace vericache {

struct FullPassMember {
  Sequence* sequence = nullptr;
  bool decides = false;
  int position = 0;      // of its first row
  int backlog_rows = 0;  // rows of decided tokens
  int most_drafts = 0;   // that the plan has room for; a horizon that has shrunk may have left more
  int drafts = 0;        // drafted tokens that it judges; fixed when the pass starts
  // The last of them is fed too, and a token beyond it decided. Else its sequence drafts on meanwhile: the pass and the
  // drafts never write the same slots of the tail.
  bool bonus = true;
  // Of a member that replays its context: tokens [replay.first, replay.end) in rows from `position` on, whose KV is
  // forgotten. It has no other rows.
  ReplayChunk replay{};
  bool chooses = false;  // compressors that choose among all tokens do so in this pass
  int first_row = 0;
  int past_pages = 0;  // full KV outside the tail, as the plan counted it: the wire may have stored more since
  int first_staged = 0;
  int fold_end = 0;      // where its resident part will end after the pass
  bool corrupt = false;  // what the wire brought failed its checksum: nothing of this member is used
  int rows() const { return backlog_rows + drafts - (bonus ? 0 : 1) + replay.rows(); }
  // The rows whose logits decide: the last decided token and the drafts that are fed.
  int deciding_row() const { return first_row + backlog_rows - 1; }
  int deciding_rows() const { return decides ? drafts + (bonus ? 1 : 0) : 0; }
};

// What a pass decides, in host memory that the device reaches; one block serves one pass after the other.
struct PassResults {
  TokenId* tokens = nullptr;   // (logit rows)
  uint64_t* hashes = nullptr;  // (logit rows)
};

class FullPass {
 public:
  // Opens the pass: the residuals of its members go on the wire now. wire is null when the full KV stays on the device,
  // rounding where no keys are rounded so.
  FullPass(const Transformer& model, Compressor* compressor, KeyRounding* rounding, Wire* wire,
           std::vector<FullPassMember> members);

  // Every deciding member has drafted what its horizon asks for, or what there is room for.
  bool members_ready() const;
  bool started() const { return next_layer_ >= 0; }
  // The first layers' full KV is at hand.
  bool arrived() const;
  void wait_arrival() const;
  // The lane may be given the next layer.
  bool layer_ready() const;
  bool computed() const { return next_layer_ == model_.config().layers; }  // every layer is enqueued
  bool enqueued() const { return last_mark_ != 0; }
  bool finished(const Activations& a) const { return enqueued() && a.lane->reached(last_mark_); }

  // Fixes the rows: each deciding member brings the drafts that are done, `most_drafts` at most. drafts_on: members go
  // on drafting while the pass runs, the steps under way included; else no step is under way. The tails must have room.
  void start(Activations& activations, const PassResults& results, bool drafts_on);
  // Enqueues the next layer; on the way verified KV enters the tails and compressors see the layer.
  void run_layer(Activations& activations);
  // After the last layer: logits of all deciding rows, one member below the other, and what they choose.
  void run_logits(Activations& activations);
  // When finished: what of the time went into computing, and which members were betrayed by the wire.
  double seconds(const Activations& activations) const;
  void collect_corruption();
  void trace(Trace& trace, const Activations& activations) const;

  std::span<FullPassMember> members() { return members_; }
  bool decides() const;
  int rows() const { return pass_.rows; }
  int past_pages() const;  // of all members
  const Fetch* fetch() const { return fetch_.get(); }

 private:
  void place_rows();
  LayerKv full_view(const FullPassMember& member, size_t index, int layer) const;
  QueryRing queries(const Sequence& sequence, int layer) const;
  Attended attended(const Sequence& sequence, const QueryRing& queries, int first, int end, int layer) const;
  QueryRing fed_queries(const FullPassMember& member, const Activations& activations) const;
  void observe(const FullPassMember& member, const SequenceRows& rows, int layer, const Activations& activations);
  void reconstruct(const FullPassMember& member, const SequenceRows& rows, int layer, const Activations& activations);
  void compress(const FullPassMember& member, const SequenceRows& rows, int layer, Kernels& lane);

  const Transformer& model_;
  Compressor* compressor_;
  KeyRounding* rounding_;
  Wire* wire_;
  std::vector<FullPassMember> members_;
  std::shared_ptr<Fetch> fetch_;
  int next_layer_ = -1;
  Mark last_mark_ = 0;
  PassRows pass_;
  std::vector<SequenceRows> sequence_rows_;  // (layers, members)
  std::vector<LogitRow> logit_rows_;
  std::vector<std::pair<Mark, Mark>> spans_;  // of each layer's computation
};

}  // namespace vericache
