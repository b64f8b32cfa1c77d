#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>

#include "engine/scheduler.h"

namespace vericache {
namespace {

std::vector<SeqId> ids(const std::vector<PassMember>& members) {
  std::vector<SeqId> out;
  for (const PassMember& member : members) {
    out.push_back(member.id);
  }
  return out;
}

// A small model of the engine: it carries plans out with passes of random length and drafts that stand or not, and
// checks each plan against what there is.
class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed) {
    most_horizon_ = between(0, 12);
    limits_.max_sequences = between(1, 9);
    limits_.pass_rows = 1 + 2 * most_horizon_ + between(0, 40);
    limits_.logit_rows = std::min(limits_.pass_rows, limits_.max_sequences * (1 + 2 * most_horizon_));
    limits_.staging_pages = below(4) == 0 ? 0 : kMostPages + between(0, 2 * kMostPages);
    limits_.resident_pages = between(40, 150);
    limits_.host_extents = between(10, 40);
    limits_.open_passes = limits_.staging_pages > 0 ? 2 : 1;
    limits_.drafting = most_horizon_ > 0;
    scheduler_ = std::make_unique<Scheduler>(limits_);
    twin_ = std::make_unique<Scheduler>(limits_);
    arrivals_ = between(1, 25);
  }

  void run() {
    int step = 0;
    for (; arrivals_ > 0 || !sequences_.empty(); ++step) {
      ASSERT_LT(step, 200'000) << "every sequence ends";
      if (arrivals_ > 0 && below(6) == 0) {
        join();
      }
      if (below(150) == 0 && !sequences_.empty()) {
        std::next(sequences_.begin(), below(static_cast<int>(sequences_.size())))->second.cancelled = true;
      }
      leave();
      give_back();
      report();
      const StepPlan plan = next();
      check_plan(plan);
      if (::testing::Test::HasFatalFailure()) {
        return;
      }
      carry_out(plan);
      if (!passes_.empty() && below(3) == 0) {
        passes_.front().started ? finish_pass() : start_pass();
      }
    }
    EXPECT_TRUE(scheduler_->empty());
    EXPECT_TRUE(passes_.empty());
    EXPECT_EQ(scheduler_->free_resident_pages(), limits_.resident_pages);
    EXPECT_EQ(scheduler_->free_host_extents(), limits_.host_extents);
  }

 private:
  static constexpr int kMostPages = 10;

  struct Sequence {
    Needs needs;
    int length = 0;  // prompt and answer
    int prompt = 0;
    int tokens = 0;
    int verified = 0;
    int stored_tokens = 0;
    int drafted = 0;
    int horizon = 0;
    int replay_tokens = 0;  // of its context, to be replayed once the prompt is read
    int replay_left = 0;
    int extents = 0;       // of those it needs
    bool evicted = false;  // it has none and waits for them
    bool admitted = false;
    bool in_pass = false;
    bool cancelled = false;
    bool told = false;    // the scheduler knows its load
    int passed_over = 0;  // passes opened without it while it could have gone
    Load load(int most_horizon) const {
      const bool over = cancelled || evicted || tokens >= length;
      return {.backlog = over ? 0 : tokens - verified,
              .drafted = drafted,
              .horizon = horizon,
              .reach = horizon,
              .most_drafts = std::min(2 * most_horizon, length - tokens - 1),
              .past_pages = stored_tokens / 64,
              .replay = over || tokens - verified != 1 ? 0 : std::min(replay_left, 200)};
    }
  };
  struct Pass {
    std::vector<PassMember> members;
    std::vector<int> drafts;
    bool started = false;
  };

  int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  int between(int low, int high) { return low + below(high - low + 1); }

  void join() {
    Sequence sequence;
    sequence.prompt = between(1, 300);
    sequence.length = sequence.prompt + between(1, 300);
    sequence.tokens = sequence.prompt;
    sequence.horizon = most_horizon_ > 0 ? between(1, most_horizon_) : 0;
    sequence.replay_tokens = sequence.replay_left = limits_.drafting && below(2) == 0 ? sequence.prompt : 0;
    sequence.needs = {.resident_pages = between(0, 40), .host_extents = between(0, 10)};
    const SeqId id = ++last_id_;
    scheduler_->enqueue(id, sequence.needs);
    twin_->enqueue(id, sequence.needs);
    sequences_.emplace(id, sequence);
    --arrivals_;
  }

  void leave() {
    std::erase_if(sequences_, [&](auto& entry) {
      auto& [id, s] = entry;
      if (s.in_pass || !(s.cancelled || s.tokens >= s.length)) {
        return false;
      }
      scheduler_->remove(id);
      twin_->remove(id);
      return true;
    });
  }

  // Pages that take less than they may, and such as come back broken.
  void give_back() {
    for (auto& [id, s] : sequences_) {
      if (!s.admitted || s.in_pass) {
        continue;
      }
      if (s.extents > 0 && below(20) == 0) {
        const int extents = between(1, s.extents);
        s.extents -= extents;
        scheduler_->release_extents(id, extents);
        twin_->release_extents(id, extents);
      }
      if (!s.evicted && below(60) == 0) {
        s.extents = 0;
        s.evicted = true;
        s.verified = s.stored_tokens = s.drafted = 0;
        scheduler_->readmit(id);
        twin_->readmit(id);
      }
    }
  }

  void report() {
    for (auto& [id, s] : sequences_) {
      if (s.admitted) {
        if (!s.in_pass && limits_.staging_pages > 0) {
          s.stored_tokens = std::max(s.stored_tokens, s.verified / 64 * 64 - below(2) * 64);
        }
        s.told = true;
        scheduler_->update(id, s.load(most_horizon_));
        twin_->update(id, s.load(most_horizon_));
      }
    }
  }

  StepPlan next() {
    const Usage usage{.open_passes = static_cast<int>(passes_.size())};
    const bool admits = scheduler_->admits();
    const StepPlan plan = scheduler_->next(usage);
    EXPECT_EQ(admits, !plan.admit.empty() || !plan.readmit.empty());
    const StepPlan same = twin_->next(usage);
    EXPECT_EQ(plan.admit, same.admit);
    EXPECT_EQ(plan.readmit, same.readmit);
    EXPECT_EQ(plan.pass, same.pass);
    EXPECT_EQ(plan.draft, same.draft);
    return plan;
  }

  void check_plan(const StepPlan& plan) {
    for (const SeqId id : plan.readmit) {
      Sequence& s = sequences_.at(id);
      ASSERT_TRUE(s.admitted && s.evicted);
      s.evicted = false;
      s.told = false;  // that it may go
      s.extents = s.needs.host_extents;
    }
    for (const auto& [id, s] : sequences_) {
      ASSERT_TRUE(plan.admit.empty() || !s.evicted) << "nobody is admitted before those";
    }
    for (const SeqId id : plan.admit) {
      ASSERT_FALSE(sequences_.at(id).admitted);
      for (const auto& [other, s] : sequences_) {
        ASSERT_TRUE(other >= id || s.admitted || std::count(plan.admit.begin(), plan.admit.end(), other) > 0)
            << "first come, first served";
      }
      sequences_.at(id).admitted = true;
      sequences_.at(id).extents = sequences_.at(id).needs.host_extents;
    }
    Needs reserved;
    int running = 0;
    for (const auto& [id, s] : sequences_) {
      reserved.resident_pages += s.admitted ? s.needs.resident_pages : 0;
      reserved.host_extents += s.admitted ? s.extents : 0;
      running += s.admitted ? 1 : 0;
    }
    ASSERT_LE(running, limits_.max_sequences);
    ASSERT_EQ(scheduler_->running(), running);
    ASSERT_LE(reserved.resident_pages, limits_.resident_pages);
    ASSERT_LE(reserved.host_extents, limits_.host_extents);
    ASSERT_EQ(scheduler_->free_resident_pages(), limits_.resident_pages - reserved.resident_pages);
    ASSERT_EQ(scheduler_->free_host_extents(), limits_.host_extents - reserved.host_extents);
    check_pass(plan.pass);
    check_service(plan.pass, running);
    for (const SeqId id : plan.draft) {
      const Sequence& s = sequences_.at(id);
      ASSERT_TRUE(limits_.drafting && s.admitted && !s.evicted && s.tokens - s.verified == 1 && s.replay_left == 0);
      const std::vector<SeqId> passing_now = ids(plan.pass);
      const bool passing = s.in_pass || std::count(passing_now.begin(), passing_now.end(), id) > 0;
      ASSERT_LT(s.drafted, (passing ? 2 : 1) * s.horizon);
      ASSERT_LT(s.drafted, s.length - s.tokens - 1) << "a draft that could be of use";
    }
  }

  void check_pass(const std::vector<PassMember>& members) {
    int rows = 0;
    int logit_rows = 0;
    int staged = 0;
    std::set<SeqId> seen;
    ASSERT_TRUE(members.empty() || static_cast<int>(passes_.size()) < limits_.open_passes);
    for (const PassMember& member : members) {
      const Sequence& s = sequences_.at(member.id);
      ASSERT_TRUE(seen.insert(member.id).second);
      ASSERT_TRUE(s.admitted && !s.in_pass && !s.cancelled);
      ASSERT_GE(member.rows, 1);
      ASSERT_GE(member.most_drafts, 0);
      ASSERT_EQ(member.past_pages, s.stored_tokens / 64);
      const int backlog = s.tokens - s.verified;
      ASSERT_EQ(member.replays, backlog == 1 && s.replay_left > 0);
      ASSERT_LE(member.rows, member.replays ? s.load(most_horizon_).replay : backlog);
      ASSERT_EQ(member.decides, !member.replays && member.rows == backlog);
      rows += member.rows + member.most_drafts;
      logit_rows += member.decides ? 1 + member.most_drafts : 0;
      staged += member.past_pages;
    }
    ASSERT_LE(rows, limits_.pass_rows);
    ASSERT_LE(logit_rows, limits_.logit_rows);
    ASSERT_TRUE(limits_.staging_pages == 0 || staged <= limits_.staging_pages);
  }

  // Whoever can go does so after a bounded number of passes of others. Prompts are read one after the other.
  void check_service(const std::vector<PassMember>& members, int running) {
    bool first_prompt = true;
    bool somebody = false;
    for (auto& [id, s] : sequences_) {
      const int backlog = s.load(most_horizon_).backlog;
      if (!s.admitted || s.in_pass || backlog == 0 || !s.told) {
        continue;
      }
      const bool reads = backlog > 1 || s.load(most_horizon_).replay > 0;
      const bool due = reads ? first_prompt : Scheduler::ready(s.load(most_horizon_));
      first_prompt = first_prompt && !reads;
      somebody = somebody || due;
      const bool goes = std::any_of(members.begin(), members.end(), [&](const PassMember& m) { return m.id == id; });
      s.passed_over = goes || !due ? 0 : s.passed_over + (members.empty() ? 0 : 1);
      ASSERT_LE(s.passed_over, 2 * running) << "sequence " << id << " starves";
    }
    ASSERT_TRUE(!somebody || !members.empty() || !passes_.empty()) << "somebody could go and nothing is under way";
  }
  void carry_out(const StepPlan& plan) {
    if (!plan.pass.empty()) {
      passes_.push_back({.members = plan.pass, .drafts = {}, .started = false});
      for (const PassMember& member : plan.pass) {
        sequences_.at(member.id).in_pass = true;
      }
    }
    if (below(5) != 0) {  // the pass in progress has the machine
      for (const SeqId id : plan.draft) {
        ++sequences_.at(id).drafted;
      }
    }
  }

  void start_pass() {
    Pass& pass = passes_.front();
    for (const PassMember& member : pass.members) {
      pass.drafts.push_back(member.decides ? std::min(sequences_.at(member.id).drafted, member.most_drafts) : 0);
    }
    pass.started = true;
  }

  void finish_pass() {
    Pass& pass = passes_.front();
    for (size_t i = 0; i < pass.members.size(); ++i) {
      const PassMember& member = pass.members[i];
      Sequence& s = sequences_.at(member.id);
      s.in_pass = false;
      if (below(60) == 0) {  // a block came back broken: all over again
        s.verified = s.stored_tokens = s.drafted = 0;
        s.replay_left = s.replay_left > 0 ? s.replay_tokens : 0;
      } else if (member.replays) {
        s.replay_left -= member.rows;
      } else if (!member.decides) {
        s.verified += member.rows;
      } else {
        const int accepted = below(3) == 0 ? pass.drafts[i] : below(pass.drafts[i] + 1);
        s.tokens = std::min(s.length, s.tokens + accepted + 1);
        s.verified = s.tokens - 1;
        const bool stand = accepted == pass.drafts[i] && s.drafted > accepted && below(2) == 0;
        s.drafted = stand ? s.drafted - accepted - 1 : 0;
        s.horizon = most_horizon_ > 0 ? between(1, most_horizon_) : 0;
      }
      scheduler_->pass_done(member.id);
      twin_->pass_done(member.id);
    }
    passes_.erase(passes_.begin());
  }

  std::mt19937_64 random_;
  SchedulerLimits limits_;
  int most_horizon_ = 0;
  int arrivals_ = 0;
  SeqId last_id_ = 0;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Scheduler> twin_;  // is told the same and must plan the same
  std::map<SeqId, Sequence> sequences_;
  std::vector<Pass> passes_;
};

TEST(SchedulerTraffic, RandomTrafficKeepsEveryInvariant) {
  for (uint64_t seed = 1; seed <= 600; ++seed) {
    Simulation(seed).run();
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace vericache
