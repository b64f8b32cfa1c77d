// Engine::State: what an engine owns, and the units of work that its step chooses from. engine.cc: requests and memory;
// lanes.cc: passes and draft steps; rounds.cc: what follows a pass. All of it on the engine's thread.
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "compress/key_rounding.h"
#include "engine/engine.h"
#include "engine/full_pass.h"
#include "engine/memory_plan.h"
#include "engine/pass_cost.h"
#include "engine/sequence.h"
#include "kv/wire.h"
#include "speculate/confidence.h"

namespace vericache {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

struct Engine::State {
  State(const Transformer& model, Device& device, std::unique_ptr<Compressor> compressor, const EngineOptions& options);
  ~State();  // waits for what is under way: it works in memory that goes with the engine
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  SeqId submit(Request request);
  bool step();

  // One unit of work each.
  bool advance_pass();
  bool draft(std::span<const SeqId> ids);
  void wait(uint64_t seen);  // nothing can be enqueued

  void admit(SeqId id);
  void plan_replay(Sequence& sequence) const;
  void open_pass(std::span<const PassMember> members);
  void start_pass(FullPass& pass);
  bool worth_drafting_on(const FullPass& pass) const;
  bool wire_bound() const;
  void stage_draft(std::span<Sequence* const> members);
  bool drafts_in_flight(size_t most);
  void linger(Kernels& lane);  // for tests: where one lane hands over to another
  bool grow_tail(Sequence& sequence, int end);
  void release_tail(Sequence& sequence);
  bool release_extents(const Sequence& sequence);
  void await_extents(const Sequence& sequence) const;
  bool may_grow(const Sequence& sequence, int end) const;
  void finish_pass(FullPass& pass);
  void finish_replay(const FullPassMember& member);
  void judge(const FullPassMember& member, int first_decided);
  void weigh(Sequence& sequence, int from) const;  // its drafts from that one on
  bool decide(Sequence& sequence, TokenId token, uint64_t logits_hash);
  void fold(const FullPassMember& member);
  void restart(Sequence& sequence);
  void report_cost(FullPassMember& member, int accepted, int deciders, double wire_seconds);
  void progress(Sequence& sequence);
  void reap();
  void update_load(const Sequence& sequence);
  void note_peaks();

  const Transformer& model;
  Device& device;
  std::unique_ptr<Compressor> compressor;
  std::unique_ptr<KeyRounding> key_rounding;  // where its format is rounded so
  EngineOptions options;
  MemoryPlan plan;
  KvShape shape;
  Kernels& pass_lane;
  Kernels& draft_lane;           // the same on a CPU
  std::unique_ptr<Device> host;  // memory of the host that the device reaches: the host tier, boards, results
  std::unique_ptr<PagePool> board_pool;
  std::unique_ptr<PagePool> record_pool;
  std::unique_ptr<PagePool> index_pool;
  std::unique_ptr<PagePool> tail_pool;
  std::unique_ptr<PagePool> resident_pool;
  std::unique_ptr<PagePool> host_pool;
  std::unique_ptr<BlockStore> block_store;  // null where nothing is behind the host tier
  std::unique_ptr<PagePool> window_pool;
  std::unique_ptr<PagePool> notes_pool;
  Activations pass_activations;
  Activations draft_activations;
  std::unique_ptr<Scheduler> scheduler;
  std::map<SeqId, std::unique_ptr<Sequence>> sequences;  // waiting and running
  std::deque<std::unique_ptr<FullPass>> passes;          // open, in order; the first computes
  std::vector<DecidedToken> decided;                     // by the member that is being judged
  PassResults results;
  PassRows draft_pass;
  std::vector<SequenceRows> draft_rows;  // (layers, sequences)
  std::vector<LogitRow> draft_choices;
  struct DraftStep {
    Mark begin = 0;
    Mark end = 0;
    std::vector<std::pair<SeqId, int>> members;  // with their draft_run
  };
  std::deque<DraftStep> draft_steps;  // enqueued and not known to be done
  SeqId next_id = 1;
  EngineStats stats;
  std::minstd_rand random;        // of linger
  double draft_row_seconds = 0;   // of one draft step per row, smoothed
  double draft_step_seconds = 0;  // of one draft step, smoothed
  double wire_page_seconds = 0;   // of one page on its way in, all layers, in the last pass that had any
  PassCost decode_cost;
  Confidence confidence;
  std::unique_ptr<Wire> wire;  // last: its workers end before what they read and write
};

}  // namespace vericache
