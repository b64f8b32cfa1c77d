#include <fmt/format.h>

#include <algorithm>
#include <thread>

#include "base/trace.h"
#include "engine/state.h"

namespace vericache {
namespace {

// Steps that the draft lane is given ahead: enough that it never waits for the host, few enough that a refusal wastes
// little.
constexpr size_t kDraftsAhead = 2;
// Layers of a pass that are enqueued before the draft lane is looked after again: their transfers cost the host time.
// An op that is done when it returns leaves the host nothing to look after.
constexpr int kLayersAtOnce = 4;

void smooth(double& mean, double value) {
  mean = mean == 0 ? value : 0.9 * mean + 0.1 * value;
}

}  // namespace

// Enqueues what of the first open pass can be, and ends it when it is done.
bool Engine::State::advance_pass() {
  if (passes.empty()) {
    return false;
  }
  FullPass& pass = *passes.front();
  if (!pass.started()) {
    // A pass whose members still draft waits for them, unless another waits behind it or the wire would wait for it.
    if (!pass.arrived() || !(pass.members_ready() || passes.size() > 1 || wire_bound())) {
      return false;
    }
    start_pass(pass);
  }
  bool advanced = false;
  const int most = device.addressable() ? shape.layers + 1 : kLayersAtOnce;
  for (int i = 0; i < most && !pass.enqueued() && (pass.computed() || pass.layer_ready()); ++i) {
    pass.computed() ? pass.run_logits(pass_activations) : pass.run_layer(pass_activations);
    advanced = true;
  }
  if (pass.finished(pass_activations)) {
    finish_pass(pass);
    passes.pop_front();
    note_peaks();
    return true;
  }
  return advanced;
}

void Engine::State::start_pass(FullPass& pass) {
  drafts_in_flight(0);
  bool drafts_on = worth_drafting_on(pass);
  for (const FullPassMember& member : pass.members()) {
    Sequence& s = *member.sequence;
    check(grow_tail(s, s.verified + member.backlog_rows + s.drafted), "the tail has room for every decoding sequence");
    // The row of the last decided token stands where its first draft step writes, if that is still under way.
    drafts_on = drafts_on && !(member.decides && (s.drafts_done == 0 || s.drafted >= s.useful_drafts()));
  }
  // Steps under way go on beside a pass whose members draft on: they write behind its rows. Else it waits for them.
  for (const FullPassMember& member : pass.members()) {
    Sequence& s = *member.sequence;
    pass_lane.follow(draft_lane, s.tail_changed);
    if (!drafts_on) {
      if (s.drafts_done != s.drafted) {
        s.drafts_done = s.drafted;
        ++s.draft_run;  // the steps under way are counted now
      }
      pass_lane.follow(draft_lane, s.last_draft);
    }
  }
  linger(pass_lane);
  pass.start(pass_activations, results, drafts_on);
}

void Engine::State::linger(Kernels& lane) {
  if (options.inject_delay_us > 0) {
    lane.delay(std::uniform_int_distribution<int>(0, options.inject_delay_us)(random));
  }
}

// What changes a tail is enqueued on the draft lane.
bool Engine::State::grow_tail(Sequence& s, int end) {
  if (end <= s.tail->end()) {
    return true;
  }
  const bool grown = s.tail->grow(end);
  s.tail_changed = draft_lane.mark();
  return grown;
}

// Gives back the page sets that are folded and stored; only while the sequence stands in no pass.
void Engine::State::release_tail(Sequence& s) {
  const int outside = s.full ? s.full->stored() * kPageTokens : s.folded;
  const int position = std::min(s.folded, outside);
  if (position > s.tail->position()) {
    s.tail->release_before(position);
    s.tail_changed = draft_lane.mark();
  }
}

// Gives back the extents that turn out not to be needed where it is known what more of its pages take; whether it is.
bool Engine::State::release_extents(const Sequence& s) {
  if (!s.full || s.full->accounted() == s.full->stored()) {
    return false;
  }
  scheduler->release_extents(s.id, s.full->shrink());
  return true;
}

// A sequence that drafts while its pass runs gives up the token that the pass would decide beyond its drafts: worth it
// when the wire leaves time for several drafts.
bool Engine::State::worth_drafting_on(const FullPass& pass) const {
  return wire_page_seconds * pass.past_pages() > 2 * draft_step_seconds;
}

bool Engine::State::wire_bound() const {
  int pages = 0;
  int horizon = 0;
  int decoding = 0;
  for (const auto& [id, s] : sequences) {
    if (s->full && s->backlog() == 1 && !s->replays()) {
      pages += s->full->stored();
      horizon += s->horizon.tokens();
      ++decoding;
    }
  }
  return decoding > 1 && wire_page_seconds * pages > draft_step_seconds * horizon / decoding;
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
    if (s.cancelled || s.finish || !may_grow(s, s.verified + member.rows)) {
      scheduler->pass_done(member.id);  // its pages are still on their way out; its turn comes again
      continue;
    }
    check(grow_tail(s, s.verified + member.rows), "the tail's pool holds what is free in it");
    accepted.push_back(
        {.sequence = &s,
         .decides = member.decides,
         .backlog_rows = member.replays ? 0 : member.rows,
         .most_drafts = member.most_drafts,
         .replay = member.replays ? replay_chunk(s.replayed, s.replay_tokens, member.rows) : ReplayChunk{},
         .past_pages = member.past_pages});
  }
  if (!accepted.empty()) {
    passes.push_back(
        std::make_unique<FullPass>(model, compressor.get(), key_rounding.get(), wire.get(), std::move(accepted)));
  }
}

// Takes note of the steps that are done. Whether `most` or more are still under way.
bool Engine::State::drafts_in_flight(size_t most) {
  while (!draft_steps.empty() && draft_lane.reached(draft_steps.front().end)) {
    const DraftStep& step = draft_steps.front();
    const double seconds = draft_lane.seconds(step.begin, step.end);
    stats.draft_seconds += seconds;
    if (options.trace != nullptr) {
      options.trace->span("draft", fmt::format("{} sequences", step.members.size()), draft_lane.time(step.begin),
                          draft_lane.time(step.end));
    }
    smooth(draft_step_seconds, seconds);
    smooth(draft_row_seconds, seconds / static_cast<double>(step.members.size()));
    for (const auto& [id, run] : step.members) {
      const auto member = sequences.find(id);
      if (member != sequences.end() && member->second->draft_run == run) {
        Sequence& s = *member->second;
        ++s.drafts_done;
        weigh(s, s.drafts_done - 1);
        update_load(s);
      }
    }
    draft_steps.pop_front();
  }
  return draft_steps.size() >= most;
}

// One token further for each: a cheap pass over resident + tail. Its KV goes to the tail, where verification overwrites
// it.
bool Engine::State::draft(std::span<const SeqId> ids) {
  if (ids.empty() || drafts_in_flight(kDraftsAhead)) {
    return false;
  }
  std::vector<Sequence*> members;
  for (const SeqId id : ids) {
    Sequence& s = *sequences.at(id);
    const int position = static_cast<int>(s.tokens.size()) + s.drafted - 1;
    // The slots up to pass_end are written by the pass that computes the sequence now.
    if (s.cancelled || s.finish || position < s.pass_end || !may_grow(s, position + 1)) {
      continue;
    }
    check(grow_tail(s, position + 1), "the tail's pool holds what is free in it");
    members.push_back(&s);
  }
  if (members.empty()) {
    return false;
  }
  stage_draft(members);
  const Mark begin = draft_lane.mark();
  draft_lane.replay_pass(draft_pass, [&] {
    model.embed(draft_pass, draft_activations);
    for (int layer = 0; layer < shape.layers; ++layer) {
      model.layer(layer, draft_pass, draft_activations);
    }
    model.logits(draft_pass, draft_activations);
  });
  DraftStep step{begin, draft_lane.mark(), {}};
  for (Sequence* s : members) {
    step.members.emplace_back(s->id, s->draft_run);
    s->last_draft = step.end;
    ++s->drafted;
    update_load(*s);
  }
  draft_steps.push_back(std::move(step));
  ++stats.draft_steps;
  return true;
}

void Engine::State::stage_draft(std::span<Sequence* const> members) {
  draft_rows.clear();
  draft_choices.clear();
  for (int layer = 0; layer < shape.layers; ++layer) {
    for (size_t i = 0; i < members.size(); ++i) {
      const Sequence& s = *members[i];
      draft_rows.push_back({.first_row = static_cast<int>(i),
                            .rows = 1,
                            .position = static_cast<int>(s.tokens.size()) + s.drafted - 1,
                            .tokens = s.board,
                            .kv = s.draft_view(layer),
                            .queries = {}});
    }
  }
  for (size_t i = 0; i < members.size(); ++i) {
    const Sequence& s = *members[i];
    const int position = draft_rows[i].position + 1;
    draft_choices.push_back({.row = static_cast<int>(i),
                             .position = position,
                             .sampling = s.request.sampling,
                             .token = s.board + position,
                             .hash = nullptr,
                             .margin = s.margins + position});
  }
  draft_pass = {.buffers = draft_activations.hidden,
                .rows = static_cast<int>(members.size()),
                .layers = shape.layers,
                .draft = true,
                .sequences = draft_rows,
                .logit_rows = draft_choices};
  linger(draft_lane);
  draft_lane.stage(draft_pass);
}

// Nothing could be enqueued: lanes are at work, or the wire is.
void Engine::State::wait(uint64_t seen) {
  const Stopwatch waiting;
  const size_t drafts = draft_steps.size();
  const bool drafting = drafts_in_flight(1);
  if (draft_steps.size() < drafts) {
    return;  // the lane takes more by now
  }
  const bool unstarted = !passes.empty() && !passes.front()->started();
  if (unstarted && !drafting && (device.addressable() || passes.front()->arrived())) {
    passes.front()->wait_arrival();
    start_pass(*passes.front());  // nobody can draft on
  } else if (!device.addressable()) {
    check(!passes.empty() || drafting || wire, "the engine has work and can always go on");
    std::this_thread::yield();
  } else if (!passes.empty()) {
    passes.front()->wait_arrival();
  } else {
    check(wire != nullptr, "the engine has work and can always go on");
    wire->wait_change(seen);  // pages on their way out hold up the tail
  }
  stats.wait_seconds += waiting.seconds();
}

}  // namespace vericache
