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
  const LogitsView logits{pass_activations.logits + static_cast<ptrdiff_t>(first_logit_row) * model.config().vocab_size,
                          member.drafts + 1, model.config().vocab_size};
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
    open = decide(s, i < verdict.accepted ? judged[static_cast<size_t>(i)] : verdict.next,
                  hash_bytes(row.data(), row.size_bytes()));
  }
  s.verified = static_cast<int>(s.tokens.size()) - 1;
  if (member.past_pages > 0) {
    s.restarts = 0;  // stored pages came back intact; an answer from the tail alone proves nothing of them
  }

  // Drafts made while the verification was under way stand if all before them stood and the next token is their first.
  const size_t behind = static_cast<size_t>(member.drafts);
  const bool stand =
      verdict.accepted == member.drafts && s.drafted.size() > behind && s.drafted[behind] == verdict.next && open;
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
  for (uint64_t seen = wire->changes(); wire->stores_pending(*s.full); seen = wire->changes()) {
    wire->wait_change(seen);
  }
  s.restart();
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
