#include <algorithm>

#include "base/hash.h"
#include "engine/state.h"
#include "speculate/verification.h"

namespace vericache {
namespace {

// A sequence whose full KV fails its checksum this often, and never comes back intact, has no memory to rely on.
constexpr int kMostRestarts = 8;

}  // namespace

void Engine::State::finish_pass(FullPass& pass) {
  int deciders = 0;
  int prefill_rows = 0;
  bool verifies = false;
  for (const FullPassMember& member : pass.members()) {
    deciders += member.decides ? 1 : 0;
    prefill_rows += member.backlog_rows - (member.decides ? 1 : 0) + member.replay.rows();
    verifies = verifies || member.drafts > 0;
  }
  const size_t crossed = pass.fetch() != nullptr ? pass.fetch()->bytes() : 0;
  const double wire_seconds = pass.fetch() != nullptr ? pass.fetch()->busy_seconds() : 0;
  const double seconds = pass.seconds(pass_activations);
  pass.collect_corruption();
  if (options.trace != nullptr) {
    pass.trace(*options.trace, pass_activations);
  }
  stats.pass_seconds += seconds;
  stats.wire_seconds += wire_seconds;
  ++stats.full_passes;
  stats.wire_in_bytes_decode += deciders > 0 ? crossed : 0;
  if (verifies) {
    stats.verify_wire_bytes += crossed;
    stats.verify_wire_tokens += pass.fetch() != nullptr ? int64_t{pass.past_pages()} * kPageTokens : 0;
  }
  stats.decode_passes += deciders > 0 ? 1 : 0;
  if (pass.past_pages() > 0) {
    wire_page_seconds = wire_seconds / pass.past_pages();
  }
  if (prefill_rows == 0) {
    decode_cost.add(pass.rows(), seconds);
  }

  int first_decided = 0;
  for (FullPassMember& member : pass.members()) {
    Sequence& s = *member.sequence;
    s.in_pass = false;
    s.pass_end = 0;
    const int64_t accepted_before = s.stats.accepted;
    if (member.corrupt) {
      restart(s);
    } else if (member.decides) {
      judge(member, first_decided);
      report_cost(member, static_cast<int>(s.stats.accepted - accepted_before), deciders, wire_seconds);
    } else {
      s.verified += member.backlog_rows;
      stats.prompt_tokens += member.backlog_rows;
      decided.clear();
      finish_replay(member);
    }
    first_decided += member.deciding_rows();
    if (!member.corrupt) {
      // Rows that were refused have overwritten older ones in the rings; those after them will be written anew.
      const int fed = member.rows() - member.replay.rows();
      const int oldest = member.position + fed - (compressor != nullptr ? compressor->query_window() : 0);
      s.notes.observed = member.position + member.backlog_rows;
      s.queries_from = std::min(std::max(s.queries_from, oldest), s.verified);
      fold(member);
    }
    if (!member.corrupt || s.finish) {
      progress(s);
    }
    scheduler->pass_done(s.id);
    update_load(s);
  }
}

// What its rows looked at is noted; their KV goes.
void Engine::State::finish_replay(const FullPassMember& member) {
  Sequence& s = *member.sequence;
  if (member.replay.rows() == 0) {
    return;
  }
  stats.replayed_tokens += member.replay.rows();
  s.replayed = member.replay.end;
  s.notes.reconstructed = s.replay_tokens;
  s.tail->release_after(s.verified);
  s.tail_changed = draft_lane.mark();
}

// Compares what a sequence drafted with what the verified logits choose; the drafts after a disagreement go.
void Engine::State::judge(const FullPassMember& member, int first_decided) {
  Sequence& s = *member.sequence;
  const int position = static_cast<int>(s.tokens.size());
  const TokenId* chosen = results.tokens + first_decided;
  const uint64_t* hashes = results.hashes + first_decided;
  const Verdict verdict = verify({s.board + position, static_cast<size_t>(member.drafts)},
                                 {chosen, static_cast<size_t>(member.deciding_rows())});

  stats.prompt_tokens += member.backlog_rows - 1;
  s.stats.rounds += member.drafts > 0 ? 1 : 0;
  s.stats.drafted += member.drafts;
  s.stats.accepted += verdict.accepted;
  for (int i = 0; i < verdict.accepted; ++i) {
    ++s.stats.accepted_at[static_cast<size_t>(i)];
  }
  for (int i = 0; i < std::min(verdict.accepted + 1, member.drafts); ++i) {
    confidence.report(s.margins[position + i], i < verdict.accepted);
  }
  decided.clear();
  bool open = true;
  for (int i = 0; i < verdict.accepted + (verdict.next ? 1 : 0) && open; ++i) {
    open = decide(s, chosen[i], hashes[i]);
  }
  s.verified = static_cast<int>(s.tokens.size()) - 1;
  if (member.past_pages > 0) {
    s.restarts = 0;  // stored pages came back intact; an answer from the tail alone proves nothing of them
  }
  // Drafts made while the verification was under way stand if all before them stood.
  if (open && !verdict.next) {
    s.drafted -= member.drafts;
    s.drafts_done -= member.drafts;
    s.chance = 1;
    weigh(s, 0);
  } else {
    s.forget_drafts();
  }
}

// What the margins of its drafts that are done say of them, from that one on.
void Engine::State::weigh(Sequence& s, int from) const {
  for (int i = from; i < s.drafts_done; ++i) {
    s.chance *= confidence.stands(s.margins[s.tokens.size() + static_cast<size_t>(i)]);
  }
}

// false: the sequence ends with this token.
bool Engine::State::decide(Sequence& s, TokenId token, uint64_t logits_hash) {
  s.board[s.tokens.size()] = token;
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
  if (s.resident) {
    s.resident->settle(draft_lane);
    s.tail_changed = draft_lane.mark();
  }
  if (s.full && !s.finish && s.folded / kPageTokens > s.storing) {
    std::vector<const std::byte*> sets;
    for (int page = s.storing; page < s.folded / kPageTokens; ++page) {
      sets.push_back(s.tail->set(page));
    }
    wire->store(*s.full, s.storing, std::move(sets), s.resident.get());
    s.storing = s.folded / kPageTokens;
  }
  release_tail(s);
}

void Engine::State::restart(Sequence& s) {
  decided.clear();
  stats.recomputed_tokens += s.verified;
  for (uint64_t seen = wire->changes(); wire->stores_pending(*s.full); seen = wire->changes()) {
    wire->wait_change(seen);
  }
  s.restart();
  scheduler->readmit(s.id);
  if (s.resident) {
    s.resident->settle(draft_lane);
  }
  s.tail_changed = draft_lane.mark();
  plan_replay(s);
  if (s.restarts > kMostRestarts) {
    s.finish = FinishReason::failed;
  }
}

void Engine::State::report_cost(FullPassMember& member, int accepted, int deciders, double wire_seconds) {
  if (member.drafts > 0) {
    member.sequence->horizon.report(member.drafts, accepted,
                                    {.draft_token = draft_row_seconds,
                                     .wire = wire_seconds / deciders,
                                     .verify = decode_cost.base() / deciders,
                                     .verify_token = decode_cost.per_row()});
  }
}

}  // namespace vericache
