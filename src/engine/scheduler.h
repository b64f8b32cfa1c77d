// Scheduler: who is admitted, who drafts, who stands in the next full pass. Pure: it sees counts, never a clock, a
// device or a tensor. Called from the engine's thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace vericache {

using SeqId = uint64_t;

// What there is to share out; fixed at start.
struct SchedulerLimits {
  int max_sequences = 1;
  int pass_rows = 512;     // rows of one full pass
  int logit_rows = 512;    // rows of one pass that may decide tokens
  int staging_pages = 0;   // full-KV pages of one layer that a pass may have staged; 0 = nothing crosses the wire
  int resident_pages = 0;  // head pages of resident KV
  int host_extents = 0;    // extents of the host tier
  int store_extents = 0;   // and of the store behind it
  int open_passes = 2;     // passes opened at once: one computes, the wire brings the next
  bool drafting = true;    // false: full-KV mode, every pass decides one token a sequence
};

// What a sequence will need at most; reserved when it is admitted, so that nothing can run out under way.
struct Needs {
  int resident_pages = 0;
  int host_extents = 0;  // or as many of the store: those of a sequence lie together
};

// Where a running sequence stands. The engine tells it after every change.
struct Load {
  int backlog = 0;      // decided tokens without verified KV; the last row of them decides. 1 = decoding
  int drafted = 0;      // drafted tokens that no verification has judged
  int horizon = 0;      // drafts after which it is expected to be ready for verification
  int reach = 0;        // drafts that make it ready
  int most_drafts = 0;  // no more drafts than this are of use (end of output or context)
  int past_pages = 0;   // full-KV pages that a pass must have staged for it
  // Rows that it may feed to replay its context (Compressor::reconstructs): until they are 0 it does not draft. Told
  // only when backlog = 1.
  int replay = 0;
  double chance = 1;        // that all it has drafted stands
  double least_chance = 0;  // below this it is ready, too; 0: drafts are counted, not weighed
};

struct PassMember {
  SeqId id = 0;
  int rows = 0;          // backlog rows to feed; a member whose backlog ends in this pass also brings its drafts
  bool decides = false;  // its backlog ends in this pass
  int most_drafts = 0;   // drafts that there is room for in the pass
  int past_pages = 0;    // full-KV pages that there is room for in staging; more may be stored by the time it opens
  bool replays = false;  // its rows replay its context instead
  friend bool operator==(const PassMember&, const PassMember&) = default;
};

struct StepPlan {
  std::vector<SeqId> admit;
  std::vector<SeqId> readmit;    // their worst case of extents is theirs again
  std::vector<PassMember> pass;  // a new full pass to open: its residuals go on the wire; empty = none
  std::vector<SeqId> draft;      // one draft step for these
};

// What the engine's lanes look like now.
struct Usage {
  int open_passes = 0;
  // The wire takes longer to bring everybody's full KV than drafting to the horizon takes: drafts that are made while a
  // sequence waits for its turn cost nothing, and the wire never idles unless all drafts are likely to stand.
  bool wire_bound = false;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerLimits& limits) : limits_(limits) {}

  // Waits until admitted, first come, first served. Needs above the limits are the caller's to refuse.
  void enqueue(SeqId id, const Needs& needs);
  void update(SeqId id, const Load& load);
  void remove(SeqId id);     // waiting or running; a running one must stand in no open pass
  void pass_done(SeqId id);  // the pass in which it stood is over
  // Of a running sequence so many extents are known not to be needed.
  void release_extents(SeqId id, int extents);
  // A running sequence has given back all its extents and waits, before those not admitted yet, until there are as many
  // as it needed at first. Until then its backlog is to be told as 0.
  void readmit(SeqId id);
  StepPlan next(const Usage& usage);
  // While held, sequences whose prompt is read wait: all of them can then begin to decode at once.
  void hold_decoding(bool held) { decoding_held_ = held; }

  bool admits() const;  // next() would admit somebody
  bool empty() const { return waiting_.empty() && running_.empty(); }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  int running() const { return static_cast<int>(running_.size()); }
  int free_resident_pages() const { return limits_.resident_pages - resident_pages_; }
  int free_host_extents() const { return limits_.host_extents - host_extents_; }
  int free_store_extents() const { return limits_.store_extents - store_extents_; }
  // Of one that was admitted: the host tier had no room for it.
  bool in_store(SeqId id) const { return running_.at(id).in_store; }
  // Ready: a pass should judge what this sequence has drafted.
  static bool ready(const Load& load);

 private:
  struct Waiting {
    SeqId id;
    Needs needs;
  };
  struct Running {
    Needs needs;
    Load load;
    int host_extents = 0;  // that it has of those it needs
    bool in_store = false;
    bool evicted = false;  // it has no extents, and waits for them
    bool in_pass = false;
    uint64_t turn = 0;  // when it last left a pass; of those equally in doubt the longest unserved goes first
  };
  void admit(StepPlan& plan);
  bool readmit_all(StepPlan& plan);
  bool has_room(const Running& evicted) const;
  bool has_room(const Waiting& first) const;
  int& extents_in(bool store) { return store ? store_extents_ : host_extents_; }
  void open_pass(const Usage& usage, StepPlan& plan);
  static int draft_limit(const Running& sequence, const Usage& usage);

  SchedulerLimits limits_;
  bool decoding_held_ = false;
  std::deque<Waiting> waiting_;
  std::map<SeqId, Running> running_;  // ordered: plans are the same for the same history
  int resident_pages_ = 0;            // reserved
  int host_extents_ = 0;
  int store_extents_ = 0;
  uint64_t turns_ = 0;
};

}  // namespace vericache
