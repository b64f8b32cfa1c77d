#include "engine/engine.h"

#include <algorithm>
#include <thread>

#include "base/error.h"
#include "compress/paged.h"
#include "engine/state.h"

namespace vericache {

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
    case FinishReason::failed:
      return "failed";
  }
  return "unknown";
}

Engine::State::State(const Transformer& model, Device& device, std::unique_ptr<Compressor> given,
                     const EngineOptions& options)
    : model(model),
      device(device),
      compressor(std::move(given)),
      options(options),
      plan(plan_memory(model, compressor.get(), options, device)),
      shape(model.kv_shape()),
      pass_lane(model.kernels().lane(Kernels::Place::pass)),
      draft_lane(model.kernels().lane(Kernels::Place::draft)) {
  if (plan.streaming) {
    compressor = nullptr;
  } else if (compressor == nullptr) {
    compressor = std::make_unique<PagedCompressor>(KvFormat{});
  }
  pass_activations = model.make_activations(options.pass_rows, plan.logit_rows, device, pass_lane);
  if (plan.most_drafts > 0) {
    draft_activations = model.make_activations(options.max_sequences, options.max_sequences, device, draft_lane);
    draft_lane.forget_passes();
  }
  const auto make_pool = [](Device& memory, size_t block_bytes, int count, std::string_view what) {
    return std::make_unique<PagePool>(memory.allocate(block_bytes * static_cast<size_t>(count), what), block_bytes,
                                      count);
  };
  host = device.make_host_memory(plan.host_bytes);
  results = {host->allocate_array<TokenId>(static_cast<size_t>(plan.logit_rows), "results"),
             host->allocate_array<uint64_t>(static_cast<size_t>(plan.logit_rows), "results")};
  board_pool = make_pool(*host, plan.board_bytes, options.max_sequences, "tokens");
  if (plan.index_bytes > 0) {
    index_pool = make_pool(device, plan.index_bytes, options.max_sequences, "tables");
  }
  if (plan.scratch_bytes > 0) {
    compressor->set_scratch(device.allocate(plan.scratch_bytes, "the compressor's scratch"));
  }
  if (plan.rounding_bytes > 0) {
    key_rounding = std::make_unique<KeyRounding>(shape, device.allocate(plan.rounding_bytes, "the rounding of keys"));
  }
  tail_pool = make_pool(device, page_set_bytes(shape), plan.tail_sets, "the tail");
  if (compressor != nullptr) {
    resident_pool = make_pool(device, head_page_bytes(compressor->format(), shape), plan.resident_pages, "resident KV");
  }
  if (plan.query_window_bytes > 0) {
    window_pool = make_pool(device, plan.query_window_bytes, options.max_sequences, "query windows");
  }
  if (plan.notes_bytes > 0) {
    notes_pool = make_pool(device, plan.sequence_notes_bytes(shape), options.max_sequences, "the compressor's notes");
  }
  if (!plan.full_on_device) {
    host_pool = make_pool(*host, extent_bytes(shape), plan.host_extents, "the host tier");
    if (plan.store_extents > 0) {
      block_store = options.open_store(extent_bytes(shape), plan.store_extents);
    }
    record_pool = make_pool(*host, plan.record_bytes, options.max_sequences, "checksums");
    WireOptions wire_options = plan.wire;
    wire_options.inject_delay_us = options.inject_delay_us;
    wire_options.inject_corruption_every = options.inject_corruption_every;
    wire_options.trace = options.trace;
    wire = make_wire(shape, wire_options, device, *host, model.kernels());
  }
  scheduler =
      std::make_unique<Scheduler>(SchedulerLimits{.max_sequences = options.max_sequences,
                                                  .pass_rows = options.pass_rows,
                                                  .logit_rows = plan.logit_rows,
                                                  .staging_pages = plan.full_on_device ? 0 : plan.wire.slot_pages,
                                                  .resident_pages = plan.resident_pages,
                                                  .host_extents = plan.host_extents,
                                                  .store_extents = plan.store_extents,
                                                  .open_passes = plan.full_on_device ? 1 : 2,
                                                  .drafting = plan.most_drafts > 0});
  stats.weight_bytes = model.weights().bytes;
  stats.activation_bytes = plan.activation_bytes;
  stats.tail_pool_bytes = plan.tail_bytes;
  stats.staging_bytes = plan.staging_bytes;
  stats.resident_pool_bytes = plan.resident_bytes;
  stats.store_bytes = static_cast<size_t>(plan.store_extents) * extent_bytes(shape);
  stats.host_pool_bytes = static_cast<size_t>(plan.host_extents) * extent_bytes(shape);
  stats.full_on_device = plan.full_on_device;
}

Engine::State::~State() {
  pass_lane.wait(pass_lane.mark());
  draft_lane.wait(draft_lane.mark());
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
    throw Error("the prompt has {} tokens, but the context holds {} with the answer; shorten it{}", prompt,
                plan.max_len, plan.max_len < model.config().max_position ? " or raise --max-model-len" : "");
  }
  if (request.max_tokens < 1) {
    throw Error("max_tokens must be 1 or more, not {}", request.max_tokens);
  }
  auto sequence =
      std::make_unique<Sequence>(options.horizon == EngineOptions::kAdaptive ? Horizon::adaptive(1, options.max_horizon)
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
  needs.host_extents =
      plan.full_on_device ? 0 : extents_for((length + kPageTokens - 1) / kPageTokens, shape, plan.wire.code);
  if (needs.resident_pages > plan.resident_pages ||
      needs.host_extents > std::max(plan.host_extents, plan.store_extents)) {
    throw Error(
        "a sequence of {} tokens does not fit the KV pools; raise --device-memory, --host-memory or --kv-store, or "
        "lower max_tokens",
        length);
  }
  scheduler->enqueue(sequence->id, needs);
  const SeqId id = sequence->id;
  sequences.emplace(id, std::move(sequence));
  return id;
}

void Engine::State::admit(SeqId id) {
  Sequence& s = *sequences.at(id);
  const int length = s.prompt_tokens + s.max_tokens;
  s.board = reinterpret_cast<TokenId*>(board_pool->take());
  check(s.board != nullptr, "there is a board for every sequence");
  s.margins = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(s.board) + plan.margin_offset);
  std::copy(s.tokens.begin(), s.tokens.end(), s.board);
  s.index_memory = index_pool != nullptr ? index_pool->take() : nullptr;
  s.tail = std::make_unique<Tail>(shape, *tail_pool, plan.sequence_sets, draft_lane,
                                  plan.tail_index_bytes > 0 ? s.index_memory : nullptr);
  if (compressor != nullptr) {
    s.resident = std::make_unique<ResidentKv>(shape, compressor->format(), *resident_pool,
                                              ResidentIndex{.memory = s.index_memory + plan.tail_index_bytes,
                                                            .max_pages = plan.resident_head_pages,
                                                            .chosen_stride = plan.chosen_stride,
                                                            .mirrored = !device.addressable()});
    s.resident->settle(draft_lane);  // the tables' last owner has left its counts there
  }
  if (!plan.full_on_device) {
    const int pages = (length + kPageTokens - 1) / kPageTokens;
    s.full = scheduler->in_store(id)
                 ? std::make_unique<FullKv>(shape, plan.wire.code, *block_store, *record_pool, pages)
                 : std::make_unique<FullKv>(shape, plan.wire.code, *host_pool, *record_pool, pages);
    await_extents(s);
  }
  if (window_pool != nullptr) {
    s.query_memory = window_pool->take();
    check(s.query_memory != nullptr, "there is a query window for every sequence");
  }
  s.notes_bytes = plan.notes_bytes;
  s.notes.max_tokens = plan.max_len;
  if (notes_pool != nullptr) {
    s.notes.device = notes_pool->take();
    check(s.notes.device != nullptr, "there are notes for every sequence");
  }
  if (plan.report_values > 0) {
    s.report_values = plan.report_values;
    s.notes.report = reinterpret_cast<int*>(reinterpret_cast<std::byte*>(s.board) + plan.report_offset);
    std::fill_n(s.notes.report, plan.report_values * shape.layers, 0);  // its last owner's stood there
  }
  s.tail_changed = draft_lane.mark();
  plan_replay(s);
  update_load(s);
}

void Engine::State::await_extents(const Sequence& s) const {
  while (!s.full->reachable(*host)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // its slabs are still being pinned
  }
}

// Whether its context is replayed once its tokens are read and one more is decided: not if nothing will be dropped or
// drafted, nor if no positions are left behind it.
void Engine::State::plan_replay(Sequence& s) const {
  if (s.replayed > 0) {
    return;  // it was
  }
  const int length = static_cast<int>(s.tokens.size());
  const bool worth = compressor != nullptr && compressor->reconstructs() && plan.most_drafts > 0 &&
                     s.useful_drafts() > 1 && s.prompt_tokens >= kPageTokens;
  const bool room = model.weights().rope.positions - length >= kLeastReplayRoom;
  s.replay_tokens = worth && room ? s.prompt_tokens : 0;
}

void Engine::State::update_load(const Sequence& s) {
  // What ends only waits for its pages to be out, and what lost them for room to have them anew.
  const bool ends = s.finish || s.cancelled || s.evicted();
  const bool replays = !ends && s.backlog() == 1 && s.replays();
  const int room = model.weights().rope.positions - s.verified;
  scheduler->update(s.id, {.backlog = ends ? 0 : s.backlog(),
                           .drafted = s.drafted,
                           .horizon = s.horizon.tokens(),
                           .reach = s.horizon.reach(),
                           .most_drafts = std::min(plan.most_drafts, s.useful_drafts()),
                           .past_pages = s.full ? s.full->stored() : 0,
                           .replay = replays ? replay_rows(s.replayed, s.replay_tokens, room) : 0,
                           .chance = s.horizon.least_chance() > 0 ? s.chance : 1,
                           .least_chance = s.horizon.least_chance()});
}

bool Engine::State::step() {
  // Read before anything is found to be pending: what ends after this is never waited for.
  const uint64_t seen = wire ? wire->changes() : 0;
  reap();
  if (scheduler->empty()) {
    return false;
  }
  bool stored = false;
  for (auto& [id, sequence] : sequences) {
    if (sequence->tail && !sequence->in_pass) {
      release_tail(*sequence);
      stored = release_extents(*sequence) || stored;
      update_load(*sequence);
    }
  }
  const StepPlan step_plan =
      scheduler->next({.open_passes = static_cast<int>(passes.size()), .wire_bound = wire_bound()});
  for (const SeqId id : step_plan.readmit) {
    Sequence& s = *sequences.at(id);
    s.full->occupy();
    await_extents(s);
    update_load(s);
  }
  for (const SeqId id : step_plan.admit) {
    admit(id);
  }
  if (!step_plan.pass.empty()) {
    open_pass(step_plan.pass);
  }
  // Both lanes are given what they can take.
  const bool advanced = advance_pass();
  if (!(draft(step_plan.draft) || advanced || stored || !step_plan.admit.empty() || !step_plan.readmit.empty())) {
    wait(seen);
  }
  return true;
}

void Engine::State::progress(Sequence& s) {
  if (s.cancelled && !s.finish) {
    s.finish = FinishReason::cancelled;
  }
  if (s.request.on_progress) {
    s.request.on_progress(
        {.id = s.id, .tokens = decided, .prompt_done = std::min(s.verified, s.prompt_tokens), .finish = s.finish});
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
    // A step under way writes its token to the board, whoever owns that by then.
    if (!s.finish || (s.full && wire->stores_pending(*s.full)) || !draft_lane.reached(s.last_draft)) {
      ++it;
      continue;
    }
    for (auto [total, own] : {std::pair{&stats.speculation.rounds, s.stats.rounds},
                              {&stats.speculation.drafted, s.stats.drafted},
                              {&stats.speculation.accepted, s.stats.accepted}}) {
      *total += own;
    }
    stats.speculation.accepted_at.resize(std::max(stats.speculation.accepted_at.size(), s.stats.accepted_at.size()));
    for (size_t i = 0; i < s.stats.accepted_at.size(); ++i) {
      stats.speculation.accepted_at[i] += s.stats.accepted_at[i];
    }
    s.tail.reset();
    s.resident.reset();
    for (auto [pool, block] : {std::pair{window_pool.get(), s.query_memory},
                               {notes_pool.get(), s.notes.device},
                               {index_pool.get(), s.index_memory},
                               {board_pool.get(), reinterpret_cast<std::byte*>(s.board)}}) {
      if (block != nullptr) {
        pool->give(block);
      }
    }
    scheduler->remove(s.id);
    it = sequences.erase(it);
  }
}

void Engine::State::note_peaks() {
  size_t resident = 0;
  size_t full = 0;
  size_t extents = 0;
  for (const auto& [id, s] : sequences) {
    resident += s->resident ? s->resident->bytes() : 0;
    full += s->full ? static_cast<size_t>(s->full->stored()) * page_set_bytes(shape) : 0;
    extents += s->full ? static_cast<size_t>(s->full->extents()) : 0;
  }
  stats.peak_extent_bytes = std::max(stats.peak_extent_bytes, extents * extent_bytes(shape));
  stats.peak_resident_bytes = std::max(stats.peak_resident_bytes, resident);
  stats.peak_full_bytes = std::max(stats.peak_full_bytes, plan.full_on_device ? resident : full);
}

Engine::Engine(const Transformer& model, Device& device, std::unique_ptr<Compressor> compressor,
               const EngineOptions& options)
    : state_(std::make_unique<State>(model, device, std::move(compressor), options)) {}
Engine::~Engine() = default;

SeqId Engine::submit(Request request) {
  return state_->submit(std::move(request));
}
bool Engine::step() {
  return state_->step();
}

bool Engine::reading() const {
  const auto any = [this](const auto& what) {
    return std::any_of(state_->sequences.begin(), state_->sequences.end(),
                       [&](const auto& entry) { return what(*entry.second); });
  };
  // Who has no place reads soon if there is room for it, or if pages on their way out may leave some.
  const bool room =
      state_->scheduler->admits() || any([](const Sequence& s) { return s.full && s.full->accounted() < s.storing; });
  return any([room](const Sequence& s) {
    const bool reads = s.decided() == 0 || s.backlog() > 1 || s.replays();
    return !s.finish && !s.cancelled && reads && ((s.tail && !s.evicted()) || room);
  });
}

void Engine::hold_decoding(bool held) {
  state_->scheduler->hold_decoding(held);
}

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
  for (const PagePool* pool :
       {state_->tail_pool.get(), state_->resident_pool.get(), state_->host_pool.get(), state_->window_pool.get(),
        state_->notes_pool.get(), state_->index_pool.get(), state_->board_pool.get(), state_->record_pool.get()}) {
    if (pool != nullptr && pool->used() != 0) {
      return false;
    }
  }
  const BlockStore* const store = state_->block_store.get();
  return store == nullptr || store->free() == store->count();
}

}  // namespace vericache
