#include "engine/scheduler.h"

#include <algorithm>

#include "base/check.h"

namespace vericache {
namespace {

// Rows that read a prompt or replay it: whoever has any does not decode yet.
int rows_to_read(const Load& load) {
  return load.backlog > 1 ? load.backlog : load.replay;
}

}  // namespace

void Scheduler::enqueue(SeqId id, const Needs& needs) {
  check(needs.resident_pages <= limits_.resident_pages &&
            needs.host_extents <= std::max(limits_.host_extents, limits_.store_extents),
        "a sequence that can never be admitted is refused before it is queued");
  waiting_.push_back({id, needs});
}

void Scheduler::update(SeqId id, const Load& load) {
  running_.at(id).load = load;
}

void Scheduler::remove(SeqId id) {
  if (const auto running = running_.find(id); running != running_.end()) {
    check(!running->second.in_pass, "a sequence leaves between passes");
    resident_pages_ -= running->second.needs.resident_pages;
    extents_in(running->second.in_store) -= running->second.host_extents;
    running_.erase(running);
  } else {
    std::erase_if(waiting_, [id](const Waiting& waiting) { return waiting.id == id; });
  }
}

void Scheduler::pass_done(SeqId id) {
  Running& sequence = running_.at(id);
  sequence.in_pass = false;
  sequence.turn = ++turns_;
}

bool Scheduler::ready(const Load& load) {
  return load.backlog == 1 && load.replay == 0 &&
         (load.chance < load.least_chance || load.drafted >= load.reach || load.drafted >= load.most_drafts);
}

void Scheduler::release_extents(SeqId id, int extents) {
  Running& sequence = running_.at(id);
  check(extents <= sequence.host_extents, "a sequence gives back extents that it has");
  sequence.host_extents -= extents;
  extents_in(sequence.in_store) -= extents;
}

void Scheduler::readmit(SeqId id) {
  Running& sequence = running_.at(id);
  release_extents(id, sequence.host_extents);
  sequence.evicted = true;
}

StepPlan Scheduler::next(const Usage& usage) {
  StepPlan plan;
  if (readmit_all(plan)) {
    admit(plan);
  }
  if (usage.open_passes < limits_.open_passes) {
    open_pass(usage, plan);
  }
  for (const auto& [id, sequence] : running_) {
    if (limits_.drafting && !decoding_held_ && sequence.load.backlog == 1 && sequence.load.replay == 0 &&
        sequence.load.drafted < draft_limit(sequence, usage)) {
      plan.draft.push_back(id);
    }
  }
  return plan;
}

bool Scheduler::has_room(const Running& evicted) const {
  return evicted.needs.host_extents <= (evicted.in_store ? free_store_extents() : free_host_extents());
}
bool Scheduler::has_room(const Waiting& first) const {
  return running() < limits_.max_sequences && first.needs.resident_pages <= free_resident_pages() &&
         first.needs.host_extents <= std::max(free_host_extents(), free_store_extents());
}

bool Scheduler::admits() const {
  for (const auto& [id, sequence] : running_) {
    if (sequence.evicted) {
      return has_room(sequence);
    }
  }
  return !waiting_.empty() && has_room(waiting_.front());
}

// false: one still waits, and whoever is not admitted yet waits behind it.
bool Scheduler::readmit_all(StepPlan& plan) {
  for (auto& [id, sequence] : running_) {
    if (!sequence.evicted) {
      continue;
    }
    if (!has_room(sequence)) {
      return false;
    }
    sequence.evicted = false;
    sequence.host_extents = sequence.needs.host_extents;
    extents_in(sequence.in_store) += sequence.host_extents;
    plan.readmit.push_back(id);
  }
  return true;
}

// First come, first served: a large sequence at the head is not overtaken for ever by small ones.
void Scheduler::admit(StepPlan& plan) {
  while (!waiting_.empty() && has_room(waiting_.front())) {
    const Waiting& first = waiting_.front();
    const bool in_store = first.needs.host_extents > free_host_extents();
    resident_pages_ += first.needs.resident_pages;
    Running sequence;
    sequence.needs = first.needs;
    sequence.host_extents = first.needs.host_extents;
    sequence.in_store = in_store;
    extents_in(in_store) += sequence.host_extents;
    sequence.turn = ++turns_;
    running_.emplace(first.id, sequence);
    plan.admit.push_back(first.id);
    waiting_.pop_front();
  }
}

// While its own verification is on the wire a sequence drafts on: those drafts stay valid when all before them is
// accepted.
int Scheduler::draft_limit(const Running& sequence, const Usage& usage) {
  const Load& load = sequence.load;
  if (usage.wire_bound) {
    return load.most_drafts;
  }
  if (!sequence.in_pass && ready(load)) {
    return 0;
  }
  return std::min(sequence.in_pass ? 2 * load.reach : load.reach, load.most_drafts);
}

void Scheduler::open_pass(const Usage& usage, StepPlan& plan) {
  std::vector<std::pair<SeqId, Running*>> decoding;
  std::vector<std::pair<SeqId, Running*>> prefilling;
  int least_missing = INT32_MAX;  // drafts until the first of the others is ready
  bool any_ready = false;
  for (auto& [id, sequence] : running_) {
    const bool reads = rows_to_read(sequence.load) > 0;
    if (sequence.in_pass || sequence.load.backlog == 0 || (decoding_held_ && !reads)) {
      continue;
    }
    if (reads) {
      prefilling.emplace_back(id, &sequence);
      continue;
    }
    decoding.emplace_back(id, &sequence);
    any_ready = any_ready || ready(sequence.load);
    least_missing = std::min(least_missing, sequence.load.horizon - sequence.load.drafted);
  }
  // With nobody ready the wire begins to bring the residuals of those who will be first. Not behind another pass, which
  // would have to start before its own members are ready; and where the wire is what everybody waits for it brings
  // nothing for drafts that all likely stand.
  const bool weighed =
      std::any_of(decoding.begin(), decoding.end(), [](const auto& one) { return one.second->load.least_chance > 0; });
  const bool early = !any_ready && prefilling.empty() && limits_.staging_pages > 0 &&
                     (usage.wire_bound ? !weighed : usage.open_passes == 0);
  std::stable_sort(decoding.begin(), decoding.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->load.chance, a.second->turn) < std::pair(b.second->load.chance, b.second->turn);
  });

  int rows_left = limits_.pass_rows;
  int logit_rows_left = limits_.logit_rows;
  int staging_left = limits_.staging_pages;
  const auto take = [&](SeqId id, Running& sequence, int rows, int logit_rows, PassMember member) {
    if (rows > rows_left || logit_rows > logit_rows_left ||
        (limits_.staging_pages > 0 && sequence.load.past_pages > staging_left)) {
      return;
    }
    rows_left -= rows;
    logit_rows_left -= logit_rows;
    staging_left -= sequence.load.past_pages;
    sequence.in_pass = true;
    member.id = id;
    member.past_pages = sequence.load.past_pages;
    plan.pass.push_back(member);
  };
  // A prompt that has waited longer than all who are ready has its share first: they could fill every pass.
  const bool held = !prefilling.empty() && std::none_of(decoding.begin(), decoding.end(), [&](const auto& other) {
    return ready(other.second->load) && other.second->turn < prefilling.front().second->turn;
  });
  const int held_rows =
      held ? std::min(rows_to_read(prefilling.front().second->load), std::max(1, limits_.pass_rows / 4)) : 0;
  const int held_staging = held ? prefilling.front().second->load.past_pages : 0;
  rows_left -= held_rows;
  logit_rows_left -= held ? 1 : 0;
  staging_left -= held_staging;
  const auto joins = [&](const Load& load) {
    return ready(load) || (early && load.horizon - load.drafted <= least_missing + load.horizon / 4);
  };
  const auto joining =
      std::count_if(decoding.begin(), decoding.end(), [&](const auto& one) { return joins(one.second->load); });
  const int share = std::min(rows_left, logit_rows_left) / std::max(1, static_cast<int>(joining)) - 1;
  for (auto& [id, sequence] : decoding) {
    if (joins(sequence->load)) {
      const Load& load = sequence->load;
      // By the time that the pass starts. Nobody knows when drafts will be in doubt that are not made: an early pass
      // has room for all that a sequence may draft, where that takes nobody else's.
      const int expected = std::min(load.horizon + std::max(load.horizon, load.drafted), 2 * load.reach);
      const int likely = early ? std::max(expected, std::min(load.reach, share)) : expected;
      const int most_drafts =
          std::clamp(usage.wire_bound ? load.most_drafts : likely, 0, std::max(0, load.most_drafts));
      take(id, *sequence, 1 + most_drafts, 1 + most_drafts, {.rows = 1, .decides = true, .most_drafts = most_drafts});
    }
  }
  rows_left += held_rows;
  logit_rows_left += held ? 1 : 0;
  staging_left += held_staging;
  for (auto& [id, sequence] : prefilling) {
    const int rows = std::min(rows_to_read(sequence->load), rows_left);
    const bool replays = sequence->load.backlog == 1;
    const bool decides = !replays && rows == sequence->load.backlog;
    if (rows > 0) {
      take(id, *sequence, rows, decides ? 1 : 0, {.rows = rows, .decides = decides, .replays = replays});
    }
  }
}

}  // namespace vericache
