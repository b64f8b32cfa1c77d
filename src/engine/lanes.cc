#include <algorithm>

#include "engine/state.h"
#include "speculate/verification.h"

namespace vericache {

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
    check(s.tail->grow(s.verified + member.backlog_rows + static_cast<int>(s.drafted.size())),
          "the tail has room for every decoding sequence");
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
    if (s.cancelled || s.finish || !may_grow(s, s.verified + member.rows)) {
      scheduler->pass_done(member.id);  // its pages are still on their way out; its turn comes again
      continue;
    }
    check(s.tail->grow(s.verified + member.rows), "the tail's pool holds what is free in it");
    accepted.push_back({.sequence = &s,
                        .decides = member.decides,
                        .backlog_rows = member.rows,
                        .most_drafts = member.most_drafts,
                        .past_pages = member.past_pages});
  }
  if (!accepted.empty()) {
    passes.push_back(std::make_unique<FullPass>(model, compressor.get(), wire.get(), std::move(accepted)));
  }
}

// One token further for each: a cheap pass over resident + tail. Its KV goes to the tail, where verification overwrites
// it.
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
    if (s.cancelled || s.finish || folded_under_it || !may_grow(s, position + 1)) {
      continue;
    }
    check(s.tail->grow(position + 1), "the tail's pool holds what is free in it");
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

}  // namespace vericache
