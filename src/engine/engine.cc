#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>

#include "base/error.h"
#include "base/hash.h"
#include "compress/paged.h"
#include "engine/full_pass.h"
#include "engine/memory_plan.h"
#include "engine/pass_cost.h"
#include "engine/sequence.h"
#include "kv/wire.h"
#include "speculate/verification.h"

namespace vericache {
namespace {

// A sequence whose full KV fails its checksum this often without a token in between has no memory to rely on.
constexpr int kMostRestarts = 8;

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop: return "stop";
    case FinishReason::length: return "length";
    case FinishReason::cancelled: return "cancelled";
    case FinishReason::failed: return "failed";
  }
  return "unknown";
}

struct Engine::State {
  State(const Transformer& model, Device& device, std::unique_ptr<Compressor> compressor, const EngineOptions& options);

  SeqId submit(Request request);
  bool step();

  // One unit of work each.
  bool advance_pass();
  bool draft(std::span<const SeqId> ids);

  void admit(SeqId id);
  void open_pass(std::span<const PassMember> members);
  void start_pass(FullPass& pass);
  bool may_grow(const Sequence& sequence, int end) const;
  void finish_pass(FullPass& pass);
  void judge(const FullPassMember& member, int first_logit_row);
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
  EngineOptions options;
  MemoryPlan plan;
  KvShape shape;
  std::unique_ptr<Device> host;  // the host tier's memory
  std::unique_ptr<PagePool> tail_pool;
  std::unique_ptr<PagePool> resident_pool;
  std::unique_ptr<PagePool> host_pool;
  std::unique_ptr<PagePool> window_pool;
  Activations pass_activations;
  Activations draft_activations;
  std::unique_ptr<Scheduler> scheduler;
  std::map<SeqId, std::unique_ptr<Sequence>> sequences;  // waiting and running
  std::deque<std::unique_ptr<FullPass>> passes;  // open, in order; the first computes
  std::vector<DecidedToken> decided;             // by the member that is being judged
  SeqId next_id = 1;
  EngineStats stats;
  double pass_seconds = 0;  // compute time of the pass in progress
  double draft_row_seconds = 0;  // of one draft step per row, smoothed
  PassCost decode_cost;
  std::unique_ptr<Wire> wire;  // last: its workers end before what they read and write
};

Engine::State::State(const Transformer& model, Device& device, std::unique_ptr<Compressor> given, const EngineOptions& options)
    : model(model), device(device), compressor(std::move(given)), options(options),
      plan(plan_memory(model, compressor.get(), options, device.available())), shape(model.kv_shape()) {
  if (plan.streaming) {
    compressor = nullptr;
  } else if (compressor == nullptr) {
    compressor = std::make_unique<PagedCompressor>(KvFormat{});
  }
  pass_activations = model.make_activations(options.pass_rows, plan.logit_rows, device);
  if (plan.most_drafts > 0) {
    draft_activations = model.make_activations(options.max_sequences, options.max_sequences, device);
  }
  const auto make_pool = [](Device& memory, size_t block_bytes, int count, std::string_view what) {
    return std::make_unique<PagePool>(memory.allocate(block_bytes * static_cast<size_t>(count), what), block_bytes, count);
  };
  tail_pool = make_pool(device, page_set_bytes(shape), plan.tail_sets, "the tail");
  if (compressor != nullptr) {
    resident_pool = make_pool(device, head_page_bytes(compressor->format(), shape), plan.resident_pages, "resident KV");
  }
  if (plan.query_window_bytes > 0) {
    window_pool = make_pool(device, plan.query_window_bytes, options.max_sequences, "query windows");
  }
  if (!plan.full_on_device) {
    host = make_cpu_device(plan.host_bytes + (1 << 20));
    host_pool = make_pool(*host, extent_bytes(shape), plan.host_extents, "the host tier");
    wire = std::make_unique<Wire>(shape,
                                  WireOptions{.gbps = options.wire_gbps,
                                              .ring_layers = options.ring_layers,
                                              .slot_pages = plan.staging_pages,
                                              .inject_delay_us = options.inject_delay_us,
                                              .inject_corruption_every = options.inject_corruption_every},
                                  device.allocate(plan.staging_bytes, "staging"));
  }
  scheduler = std::make_unique<Scheduler>(SchedulerLimits{.max_sequences = options.max_sequences,
                                                          .pass_rows = options.pass_rows,
                                                          .logit_rows = plan.logit_rows,
                                                          .staging_pages = plan.full_on_device ? 0 : plan.staging_pages,
                                                          .resident_pages = plan.resident_pages,
                                                          .host_extents = plan.host_extents,
                                                          .open_passes = plan.full_on_device ? 1 : 2,
                                                          .drafting = plan.most_drafts > 0});
  stats.weight_bytes = model.weights().bytes;
  stats.activation_bytes = plan.activation_bytes;
  stats.tail_pool_bytes = plan.tail_bytes;
  stats.staging_bytes = plan.staging_bytes;
  stats.resident_pool_bytes = plan.resident_bytes;
  stats.host_pool_bytes = plan.host_bytes;
  stats.full_on_device = plan.full_on_device;
}

SeqId Engine::State::submit(Request request) {
  validate(request.sampling);
  const int prompt = static_cast<int>(request.prompt.size());
  if (prompt == 0) {
    throw Error("the prompt is empty; give at least one token");
  }
  for (const TokenId token : request.prompt) {
    if (token < 0 || token >= model.config().vocab_size) {
      throw Error("the prompt holds token {}, but the vocabulary has {}", token, model.config().vocab_size);
    }
  }
  if (prompt >= plan.max_len) {
    throw Error("the prompt has {} tokens, but the context holds {} with the answer; shorten it{}", prompt, plan.max_len,
                plan.max_len < model.config().max_position ? " or raise --max-model-len" : "");
  }
  if (request.max_tokens < 1) {
    throw Error("max_tokens must be 1 or more, not {}", request.max_tokens);
  }
  auto sequence = std::make_unique<Sequence>(options.horizon == EngineOptions::kAdaptive ? Horizon::adaptive(1, options.max_horizon)
                                                                                        : Horizon::fixed(options.horizon));
  sequence->id = next_id++;
  sequence->prompt_tokens = prompt;
  sequence->max_tokens = std::min(request.max_tokens, plan.max_len - prompt);
  sequence->tokens = request.prompt;
  sequence->request = std::move(request);
  sequence->stats.accepted_at.resize(static_cast<size_t>(plan.most_drafts));

  const int length = prompt + sequence->max_tokens;
  Needs needs;
  needs.resident_pages = compressor != nullptr ? resident_pages_for(*compressor, length, shape) : 0;
  needs.host_extents = plan.full_on_device ? 0 : extents_for((length + kPageTokens - 1) / kPageTokens, shape);
  if (needs.resident_pages > plan.resident_pages || needs.host_extents > plan.host_extents) {
    throw Error("a sequence of {} tokens does not fit the KV pools; raise --device-memory or --host-memory, or lower max_tokens", length);
  }
  scheduler->enqueue(sequence->id, needs);
  const SeqId id = sequence->id;
  sequences.emplace(id, std::move(sequence));
  return id;
}

void Engine::State::admit(SeqId id) {
  Sequence& s = *sequences.at(id);
  const int length = s.prompt_tokens + s.max_tokens;
  s.tail = std::make_unique<Tail>(shape, *tail_pool, plan.sequence_sets);
  s.resident_end.assign(static_cast<size_t>(shape.layers), 0);
  if (compressor != nullptr) {
    s.resident = std::make_unique<ResidentKv>(shape, compressor->format(), *resident_pool, compressor->kept_tokens(length));
  }
  if (!plan.full_on_device) {
    s.full = std::make_unique<FullKv>(shape, *host_pool, (length + kPageTokens - 1) / kPageTokens);
  }
  if (window_pool != nullptr) {
    s.query_memory = window_pool->take();
    check(s.query_memory != nullptr, "there is a query window for every sequence");
    const int queries = model.config().heads * shape.key_dim();
    const int capacity = compressor->query_window();
    for (int layer = 0; layer < shape.layers; ++layer) {
      s.windows.emplace_back(s.query_memory + static_cast<size_t>(layer) * QueryWindow::bytes(capacity, queries, model.config().heads), capacity,
                             queries, model.config().heads);
    }
  }
  update_load(s);
}

void Engine::State::update_load(const Sequence& s) {
  scheduler->update(s.id, {.backlog = s.backlog(),
                           .drafted = static_cast<int>(s.drafted.size()),
                           .horizon = s.horizon.tokens(),
                           .most_drafts = std::min(plan.most_drafts, s.useful_drafts()),
                           .past_pages = s.full ? s.full->stored() : 0});
}

bool Engine::State::step() {
  reap();
  if (scheduler->empty()) {
    return false;
  }
  const uint64_t seen = wire ? wire->changes() : 0;
  for (auto& [id, sequence] : sequences) {
    if (sequence->tail && !sequence->in_pass && !sequence->finish) {
      sequence->release_tail();
      update_load(*sequence);
    }
  }
  const StepPlan step_plan = scheduler->next({.open_passes = static_cast<int>(passes.size())});
  for (const SeqId id : step_plan.admit) {
    admit(id);
  }
  if (!step_plan.pass.empty()) {
    open_pass(step_plan.pass);
  }
  if (advance_pass() || draft(step_plan.draft) || !step_plan.admit.empty()) {
    return true;
  }
  const Stopwatch waiting;
  if (!passes.empty()) {
    FullPass& pass = *passes.front();
    pass.wait_layer();
    if (!pass.started()) {
      start_pass(pass);  // nobody can draft on
    }
  } else if (wire) {
    wire->wait_change(seen);  // pages on their way out hold up the tail
  } else {
    check(false, "the engine has work and can always go on");
  }
  stats.wait_seconds += waiting.seconds();
  return true;
}

// Runs the layers of the first open pass whose full KV is at hand.
bool Engine::State::advance_pass() {
  if (passes.empty()) {
    return false;
  }
  FullPass& pass = *passes.front();
  if (!pass.started()) {
    // A pass whose members still draft waits for them, unless another waits behind it.
    if (!pass.layer_arrived() || !(pass.members_ready() || passes.size() > 1)) {
      return false;
    }
    start_pass(pass);
  }
  if (!pass.layer_arrived()) {
    return false;
  }
  const Stopwatch watch;
  while (!pass.finished() && pass.layer_arrived()) {
    pass.run_layer(pass_activations);
  }
  const bool finished = pass.finished();
  if (finished) {
    pass.run_logits(pass_activations);
  }
  pass_seconds += watch.seconds();
  stats.pass_seconds += watch.seconds();
  if (finished) {
    finish_pass(pass);
    passes.pop_front();
    note_peaks();
  }
  return true;
}

void Engine::State::start_pass(FullPass& pass) {
  for (const FullPassMember& member : pass.members()) {
    Sequence& s = *member.sequence;
    check(s.tail->grow(s.verified + member.backlog_rows + static_cast<int>(s.drafted.size())), "the tail has room for every decoding sequence");
  }
  pass.start(pass_activations);
}

bool Engine::State::may_grow(const Sequence& sequence, int end) const {
  const int sets = (end - sequence.tail->position() + kPageTokens - 1) / kPageTokens;
  if (sets <= plan.decode_sets) {
    return true;
  }
  // What the others need to decode is theirs, the ones not yet admitted included.
  int reserved = options.max_sequences * plan.decode_sets - plan.decode_sets;
  for (const auto& [id, other] : sequences) {
    if (other->tail && other.get() != &sequence) {
      reserved -= std::min(plan.decode_sets, other->tail->sets());
    }
  }
  return sets <= plan.sequence_sets && tail_pool->free() - (sets - sequence.tail->sets()) >= reserved;
}

void Engine::State::open_pass(std::span<const PassMember> members) {
  std::vector<FullPassMember> accepted;
  for (const PassMember& member : members) {
    Sequence& s = *sequences.at(member.id);
    if (s.cancelled || !may_grow(s, s.verified + member.rows)) {
      scheduler->pass_done(member.id);  // its pages are still on their way out; its turn comes again
      continue;
    }
    check(s.tail->grow(s.verified + member.rows), "the tail's pool holds what is free in it");
    accepted.push_back({.sequence = &s, .decides = member.decides, .backlog_rows = member.rows});
  }
  if (!accepted.empty()) {
    passes.push_back(std::make_unique<FullPass>(model, compressor.get(), wire.get(), std::move(accepted)));
  }
}

// One token further for each: a cheap pass over resident + tail. Its KV goes to the tail, where verification overwrites it.
bool Engine::State::draft(std::span<const SeqId> ids) {
  const Stopwatch watch;
  std::vector<Sequence*> members;
  std::vector<TokenId> tokens;
  std::vector<SequenceRows> rows;
  for (const SeqId id : ids) {
    Sequence& s = *sequences.at(id);
    const int position = static_cast<int>(s.tokens.size() + s.drafted.size()) - 1;
    // While a pass computes the sequence's last token, that token's page may be folded already: its draft waits.
    const bool folded_under_it = position < s.resident_end.front();
    if (s.cancelled || s.finish || folded_under_it || !s.tail->grow(position + 1)) {
      continue;
    }
    rows.push_back({.first_row = static_cast<int>(members.size()), .rows = 1, .position = position, .kv = {}});
    tokens.push_back(s.drafted.empty() ? s.tokens.back() : s.drafted.back());
    members.push_back(&s);
  }
  if (members.empty()) {
    return false;
  }
  const int count = static_cast<int>(members.size());
  model.embed(tokens, draft_activations);
  for (int layer = 0; layer < shape.layers; ++layer) {
    for (size_t i = 0; i < members.size(); ++i) {
      rows[i].kv = members[i]->draft_view(layer);
      // What the pass in progress has computed for this row's token is verified: drafts read it and leave it.
      rows[i].keep_kv = rows[i].position < members[i]->pass_end && layer < passes.front()->next_layer();
    }
    model.layer(layer, count, rows, draft_activations);
  }
  std::vector<int> all(members.size());
  for (int i = 0; i < count; ++i) {
    all[static_cast<size_t>(i)] = i;
  }
  model.logits(all, draft_activations);
  const LogitsView logits{draft_activations.logits, count, model.config().vocab_size};
  for (int i = 0; i < count; ++i) {
    Sequence& s = *members[static_cast<size_t>(i)];
    s.drafted.push_back(choose(logits.row(i), s.request.sampling, rows[static_cast<size_t>(i)].position + 1));
    update_load(s);
  }
  ++stats.draft_steps;
  stats.draft_seconds += watch.seconds();
  const double per_row = watch.seconds() / count;
  draft_row_seconds = draft_row_seconds == 0 ? per_row : 0.9 * draft_row_seconds + 0.1 * per_row;
  return true;
}

void Engine::State::finish_pass(FullPass& pass) {
  int deciders = 0;
  int prefill_rows = 0;
  for (const FullPassMember& member : pass.members()) {
    deciders += member.decides ? 1 : 0;
    prefill_rows += member.backlog_rows - (member.decides ? 1 : 0);
  }
  const size_t crossed = pass.fetch() != nullptr ? pass.fetch()->bytes() : 0;
  const double wire_seconds = pass.fetch() != nullptr ? pass.fetch()->busy_seconds() : 0;
  ++stats.full_passes;
  stats.wire_in_bytes_decode += deciders > 0 ? crossed : 0;
  stats.decode_passes += deciders > 0 ? 1 : 0;
  if (prefill_rows == 0) {
    decode_cost.add(pass.rows(), pass_seconds);
  }
  pass_seconds = 0;

  int logit_row = 0;
  for (FullPassMember& member : pass.members()) {
    Sequence& s = *member.sequence;
    s.in_pass = false;
    s.pass_end = 0;
    const int64_t accepted_before = s.stats.accepted;
    if (member.corrupt) {
      restart(s);
    } else if (member.decides) {
      judge(member, logit_row);
      report_cost(member, static_cast<int>(s.stats.accepted - accepted_before), deciders, wire_seconds);
    } else {
      s.verified += member.backlog_rows;
      stats.prompt_tokens += member.backlog_rows;
      decided.clear();
    }
    logit_row += member.decides ? member.drafts + 1 : 0;
    if (!member.corrupt) {
      fold(member);
    }
    if (!member.corrupt || s.finish) {
      progress(s);
    }
    scheduler->pass_done(s.id);
    update_load(s);
  }
}

// Compares what a sequence drafted with what the verified logits choose; the drafts after a disagreement go.
void Engine::State::judge(const FullPassMember& member, int first_logit_row) {
  Sequence& s = *member.sequence;
  const int position = static_cast<int>(s.tokens.size());
  const LogitsView logits{pass_activations.logits + static_cast<ptrdiff_t>(first_logit_row) * model.config().vocab_size, member.drafts + 1,
                          model.config().vocab_size};
  const std::span<const TokenId> judged(s.drafted.data(), static_cast<size_t>(member.drafts));
  const Verdict verdict = verify(judged, logits, s.request.sampling, position);

  stats.prompt_tokens += member.backlog_rows - 1;
  s.stats.rounds += member.drafts > 0 ? 1 : 0;
  s.stats.drafted += member.drafts;
  s.stats.accepted += verdict.accepted;
  for (int i = 0; i < verdict.accepted; ++i) {
    ++s.stats.accepted_at[static_cast<size_t>(i)];
  }
  decided.clear();
  bool open = true;
  for (int i = 0; i <= verdict.accepted && open; ++i) {
    const std::span<const float> row = logits.row(i);
    open = decide(s, i < verdict.accepted ? judged[static_cast<size_t>(i)] : verdict.next, hash_bytes(row.data(), row.size_bytes()));
  }
  s.verified = static_cast<int>(s.tokens.size()) - 1;
  s.restarts = 0;

  // Drafts made while the verification was under way stand if all before them stood and the next token is their first.
  const size_t behind = static_cast<size_t>(member.drafts);
  const bool stand = verdict.accepted == member.drafts && s.drafted.size() > behind && s.drafted[behind] == verdict.next && open;
  s.drafted.erase(s.drafted.begin(), stand ? s.drafted.begin() + static_cast<ptrdiff_t>(behind) + 1 : s.drafted.end());
}

// false: the sequence ends with this token.
bool Engine::State::decide(Sequence& s, TokenId token, uint64_t logits_hash) {
  s.tokens.push_back(token);
  decided.push_back({token, logits_hash});
  ++stats.decided_tokens;
  if (std::find(s.request.stop_tokens.begin(), s.request.stop_tokens.end(), token) != s.request.stop_tokens.end()) {
    s.finish = FinishReason::stop;
  } else if (s.decided() >= s.max_tokens) {
    s.finish = FinishReason::length;
  }
  return !s.finish;
}

// The pages that the pass completed belong to the resident part now; what the host tier lacks of them flows out.
void Engine::State::fold(const FullPassMember& member) {
  Sequence& s = *member.sequence;
  s.folded = member.fold_end;
  std::fill(s.resident_end.begin(), s.resident_end.end(), s.folded);
  if (s.full && !s.finish && s.folded / kPageTokens > s.storing) {
    std::vector<const std::byte*> sets;
    for (int page = s.storing; page < s.folded / kPageTokens; ++page) {
      sets.push_back(s.tail->set(page));
    }
    wire->store(*s.full, s.storing, std::move(sets));
    s.storing = s.folded / kPageTokens;
  }
  s.release_tail();
}

void Engine::State::restart(Sequence& s) {
  decided.clear();
  stats.recomputed_tokens += s.verified;
  while (wire->stores_pending(*s.full)) {
    wire->wait_change(wire->changes());
  }
  s.restart();
  if (s.restarts > kMostRestarts) {
    s.finish = FinishReason::failed;
  }
}

void Engine::State::report_cost(FullPassMember& member, int accepted, int deciders, double wire_seconds) {
  if (member.drafts > 0) {
    member.sequence->horizon.report(member.drafts, accepted, {.draft_token = draft_row_seconds,
                                                              .wire = wire_seconds / deciders,
                                                              .verify = decode_cost.base() / deciders,
                                                              .verify_token = decode_cost.per_row()});
  }
}

void Engine::State::progress(Sequence& s) {
  if (s.cancelled && !s.finish) {
    s.finish = FinishReason::cancelled;
  }
  if (s.request.on_progress) {
    s.request.on_progress({.id = s.id, .tokens = decided, .prompt_done = std::min(s.verified, s.prompt_tokens), .finish = s.finish});
  }
  decided.clear();
}

// Ends what is cancelled or done, once no lane holds its memory any more.
void Engine::State::reap() {
  for (auto it = sequences.begin(); it != sequences.end();) {
    Sequence& s = *it->second;
    if (s.in_pass) {
      ++it;
      continue;
    }
    if (!s.finish && s.cancelled) {
      decided.clear();
      progress(s);
    }
    if (!s.finish || (s.full && wire->stores_pending(*s.full))) {
      ++it;
      continue;
    }
    for (auto [total, own] : {std::pair{&stats.speculation.rounds, s.stats.rounds}, {&stats.speculation.drafted, s.stats.drafted},
                              {&stats.speculation.accepted, s.stats.accepted}}) {
      *total += own;
    }
    stats.speculation.accepted_at.resize(std::max(stats.speculation.accepted_at.size(), s.stats.accepted_at.size()));
    for (size_t i = 0; i < s.stats.accepted_at.size(); ++i) {
      stats.speculation.accepted_at[i] += s.stats.accepted_at[i];
    }
    if (s.query_memory != nullptr) {
      window_pool->give(s.query_memory);
    }
    scheduler->remove(s.id);
    it = sequences.erase(it);
  }
}

void Engine::State::note_peaks() {
  size_t resident = 0;
  size_t full = 0;
  for (const auto& [id, s] : sequences) {
    resident += s->resident ? s->resident->bytes() : 0;
    full += s->full ? static_cast<size_t>(s->full->stored()) * page_set_bytes(shape) : 0;
  }
  stats.peak_resident_bytes = std::max(stats.peak_resident_bytes, resident);
  stats.peak_full_bytes = std::max(stats.peak_full_bytes, plan.full_on_device ? resident : full);
}

Engine::Engine(const Transformer& model, Device& device, std::unique_ptr<Compressor> compressor, const EngineOptions& options)
    : state_(std::make_unique<State>(model, device, std::move(compressor), options)) {}
Engine::~Engine() = default;

SeqId Engine::submit(Request request) { return state_->submit(std::move(request)); }
bool Engine::step() { return state_->step(); }

void Engine::cancel(SeqId id) {
  if (const auto sequence = state_->sequences.find(id); sequence != state_->sequences.end()) {
    sequence->second->cancelled = true;
  }
}

const EngineStats& Engine::stats() const {
  EngineStats& stats = state_->stats;
  if (state_->wire) {
    stats.wire_in_bytes = state_->wire->bytes_in();
    stats.wire_out_bytes = state_->wire->bytes_out();
    stats.corrupt_blocks = static_cast<int64_t>(state_->wire->corrupt_blocks());
  }
  return stats;
}

bool Engine::pools_whole() const {
  for (const PagePool* pool : {state_->tail_pool.get(), state_->resident_pool.get(), state_->host_pool.get(), state_->window_pool.get()}) {
    if (pool != nullptr && pool->used() != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace vericache
