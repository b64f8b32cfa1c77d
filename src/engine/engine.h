// Engine: many sequences in flight over one model. It speaks tokens. All calls come from one thread, which drives it by
// step().
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/sampling.h"
#include "base/token.h"
#include "compress/compressor.h"
#include "engine/options.h"
#include "engine/scheduler.h"
#include "model/transformer.h"

namespace vericache {

// stop: an end token; length: max_tokens or the end of the context; failed: the full KV kept failing its checksums, so
// that no answer could be trusted.
enum class FinishReason { stop, length, cancelled, failed };
std::string_view finish_reason_name(FinishReason reason);

// A token and the 64-bit hash of the row of logits it was chosen from.
struct DecidedToken {
  TokenId id = 0;
  uint64_t logits_hash = 0;
};

// What a sequence has to say after a pass. `finish` is set once, on its last progress; every sequence gets exactly one.
struct Progress {
  SeqId id = 0;
  std::span<const DecidedToken> tokens;  // new since the last progress; an end token is included
  int prompt_done = 0;                   // prompt tokens whose KV is computed
  std::optional<FinishReason> finish;
};

struct Request {
  std::vector<TokenId> prompt;  // not empty
  Sampling sampling;
  int max_tokens = 256;
  std::vector<TokenId> stop_tokens;  // end tokens; the caller fills in the model's
  std::function<void(const Progress&)> on_progress;
};

struct SequenceStats {
  int64_t rounds = 0;                // verifications that judged at least one drafted token
  int64_t drafted = 0;               // tokens that verifications judged
  int64_t accepted = 0;              // of them, tokens that stood
  std::vector<int64_t> accepted_at;  // (max drafts): how often the token drafted at this place stood
};

// Totals since construction; bytes are those of this moment unless named peak.
struct EngineStats {
  SequenceStats speculation;    // of finished sequences
  int64_t prompt_tokens = 0;    // KV computed in prefill
  int64_t replayed_tokens = 0;  // rows fed to replay contexts, their leads included; their KV was thrown away
  int64_t decided_tokens = 0;
  int64_t draft_steps = 0;
  int64_t full_passes = 0;
  int64_t decode_passes = 0;  // full passes that decided at least one token
  double draft_seconds = 0;   // inside draft steps, the layers of full passes and transfers in, as the device saw it
  double pass_seconds = 0;
  double wire_seconds = 0;
  double wait_seconds = 0;          // in which the engine's thread found nothing to enqueue
  size_t wire_in_bytes = 0;         // residuals brought in
  size_t wire_in_bytes_decode = 0;  // of them, for passes that decided tokens
  size_t wire_out_bytes = 0;        // full KV flown out
  int64_t corrupt_blocks = 0;       // checksum mismatches, each answered by recomputation
  int64_t recomputed_tokens = 0;
  size_t weight_bytes = 0;
  size_t activation_bytes = 0;
  size_t tail_pool_bytes = 0;
  size_t staging_bytes = 0;
  size_t resident_pool_bytes = 0;
  size_t host_pool_bytes = 0;
  size_t store_bytes = 0;          // behind the host tier
  size_t peak_resident_bytes = 0;  // compressed KV held at once, all sequences
  size_t peak_full_bytes = 0;      // full KV held at once outside the device (or in it, where it fits)
  size_t peak_extent_bytes = 0;    // of the host tier and the store, held at once: as it is coded there, and room
  bool full_on_device = false;     // the full KV fits and stays there: nothing crosses the wire
  // What was brought in for passes that judged drafts, and the tokens whose full KV it completed.
  size_t verify_wire_bytes = 0;
  int64_t verify_wire_tokens = 0;
};

class Engine {
 public:
  // compressor: null or "none" with options.horizon 0 = full-KV mode: the full KV stays on the device where it fits and
  // is streamed over the wire at every pass where it does not. Pools share what the device's budget has left. Error if
  // that cannot hold one sequence: the message names the least that can.
  Engine(const Transformer& model, Device& device, std::unique_ptr<Compressor> compressor,
         const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Error if the prompt is empty, holds an id outside the vocabulary, or does not fit max_model_len with at least one
  // new token, or a sampling parameter is out of range. max_tokens is cut to what the context leaves.
  SeqId submit(Request request);
  void cancel(SeqId id);  // its last progress comes with FinishReason::cancelled; unknown ids are ignored
  // For measurements: while held, sequences wait once their prompt is read and one token decided. Not to be stepped
  // when all of them wait.
  void hold_decoding(bool held);
  // A prompt is to be read or replayed, or waits for it with room to come; not for others to end.
  bool reading() const;
  bool step();  // does one unit of work; false when no sequence is left
  void run() {
    while (step()) {
    }
  }

  const EngineStats& stats() const;
  // When idle: every pool is whole again. For tests and for a server's idle time.
  bool pools_whole() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vericache
