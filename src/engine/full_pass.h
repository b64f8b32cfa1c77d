// FullPass: one forward pass over full + tail for rows of several sequences: prefill chunks, verifications and plain
// decoding are all this. It runs layer by layer behind the wire. Owned by the engine's thread.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "compress/compressor.h"
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
  int drafts = 0;        // rows of drafted tokens behind them; fixed when the pass starts
  int first_row = 0;
  int past_pages = 0;  // full KV outside the tail, as the plan counted it: the wire may have stored more since
  int first_staged = 0;
  int fold_end = 0;      // where its resident part will end after the pass
  bool corrupt = false;  // what the wire brought failed its checksum: nothing of this member is used
  int rows() const { return backlog_rows + drafts; }
  // The rows whose logits decide: the last decided token and the drafts.
  int deciding_row() const { return first_row + backlog_rows - 1; }
};

class FullPass {
 public:
  // Opens the pass: the residuals of its members go on the wire now. wire is null when the full KV stays on the device.
  FullPass(const Transformer& model, Compressor* compressor, Wire* wire, std::vector<FullPassMember> members);

  // Every deciding member has drafted what its horizon asks for.
  bool members_ready() const;
  bool started() const { return next_layer_ >= 0; }
  int next_layer() const { return next_layer_; }
  bool finished() const { return next_layer_ == model_.config().layers; }
  // The next layer's full KV is at hand.
  bool layer_arrived() const;
  void wait_layer() const;

  // Fixes the rows: each deciding member brings the drafts it has by now. The tails must have room for them.
  void start(Activations& activations);
  // Runs the next layer; on the way verified KV enters the tails and compressors see the layer.
  void run_layer(Activations& activations);
  // After the last layer: logits of all deciding rows, one member below the other.
  void run_logits(Activations& activations);

  std::span<FullPassMember> members() { return members_; }
  bool decides() const;
  int rows() const { return rows_; }
  const Fetch* fetch() const { return fetch_.get(); }

 private:
  LayerKv full_view(const FullPassMember& member, size_t index, int layer);
  void compress(const FullPassMember& member, const LayerKv& kv, int layer, const Activations& activations);

  const Transformer& model_;
  Compressor* compressor_;
  Wire* wire_;
  std::vector<FullPassMember> members_;
  std::shared_ptr<Fetch> fetch_;
  int rows_ = 0;
  int next_layer_ = -1;
  std::vector<SequenceRows> sequence_rows_;  // per member
  std::vector<std::byte*> staged_table_;     // per member: (kv_heads, past_pages)
  std::vector<size_t> table_begin_;          // per member
  std::vector<int> past_tokens_;             // per member: (kv_heads)
};

}  // namespace vericache
