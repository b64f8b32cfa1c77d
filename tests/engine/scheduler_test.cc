#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>

namespace vericache {
namespace {

SchedulerLimits limits() {
  return {.max_sequences = 4,
          .pass_rows = 100,
          .logit_rows = 60,
          .staging_pages = 20,
          .resident_pages = 100,
          .host_extents = 50,
          .open_passes = 2,
          .drafting = true};
}

Load decoding(int drafted, int horizon, int past_pages = 0) {
  return {.backlog = 1, .drafted = drafted, .horizon = horizon, .most_drafts = 100, .past_pages = past_pages};
}
Load prefilling(int backlog, int past_pages = 0) {
  return {.backlog = backlog, .drafted = 0, .horizon = 8, .most_drafts = 16, .past_pages = past_pages};
}

// Sequences 1..count, admitted.
Scheduler admitted(const SchedulerLimits& limits, int count) {
  Scheduler scheduler(limits);
  for (int i = 1; i <= count; ++i) {
    scheduler.enqueue(static_cast<SeqId>(i), {});
  }
  EXPECT_EQ(scheduler.next({}).admit.size(), static_cast<size_t>(count));
  return scheduler;
}

std::vector<SeqId> ids(const std::vector<PassMember>& members) {
  std::vector<SeqId> out;
  for (const PassMember& member : members) {
    out.push_back(member.id);
  }
  return out;
}

using Ids = std::vector<SeqId>;

TEST(Scheduler, AdmitsInOrderByWhatIsReserved) {
  Scheduler scheduler(limits());
  scheduler.enqueue(1, {.resident_pages = 60, .host_extents = 10});
  scheduler.enqueue(2, {.resident_pages = 50, .host_extents = 10});  // does not fit beside 1
  scheduler.enqueue(3, {.resident_pages = 10, .host_extents = 10});  // would, but does not overtake
  EXPECT_EQ(scheduler.next({}).admit, Ids{1});
  EXPECT_EQ(scheduler.free_resident_pages(), 40);
  EXPECT_EQ(scheduler.free_host_extents(), 40);
  EXPECT_EQ(scheduler.waiting(), 2);
  EXPECT_TRUE(scheduler.next({}).admit.empty());
  scheduler.remove(1);
  EXPECT_EQ(scheduler.next({}).admit, (Ids{2, 3}));
  EXPECT_EQ(scheduler.free_resident_pages(), 40);
  scheduler.enqueue(4, {.resident_pages = 0, .host_extents = 31});  // extents bind as pages do
  EXPECT_TRUE(scheduler.next({}).admit.empty());
  scheduler.remove(2);
  EXPECT_EQ(scheduler.next({}).admit, Ids{4});
  scheduler.remove(3);
  scheduler.remove(4);
  EXPECT_TRUE(scheduler.empty());
  EXPECT_EQ(scheduler.free_resident_pages(), 100);
  EXPECT_EQ(scheduler.free_host_extents(), 50);
}

TEST(Scheduler, AdmitsNoMoreThanItsSequences) {
  Scheduler scheduler(limits());
  for (SeqId id = 1; id <= 6; ++id) {
    scheduler.enqueue(id, {});
  }
  EXPECT_EQ(scheduler.next({}).admit, (Ids{1, 2, 3, 4}));
  scheduler.remove(6);  // while it waits
  scheduler.remove(2);
  EXPECT_EQ(scheduler.next({}).admit, Ids{5});
  EXPECT_EQ(scheduler.waiting(), 0);
}

TEST(SchedulerDeathTest, RefusesWhatCouldNeverBeAdmitted) {
  Scheduler scheduler(limits());
  EXPECT_DEATH(scheduler.enqueue(1, {.resident_pages = 101}), "refused before");
  EXPECT_DEATH(
      {
        scheduler.enqueue(1, {});
        scheduler.next({});
        scheduler.update(1, decoding(8, 8));
        scheduler.next({});
        scheduler.remove(1);
      },
      "between passes");
}

TEST(Scheduler, APassTakesTheReadyWithRoomForTheirDrafts) {
  Scheduler scheduler = admitted(limits(), 4);
  scheduler.update(1, decoding(8, 8, 3));
  scheduler.update(2, decoding(7, 8, 3));  // not ready
  scheduler.update(3, decoding(10, 8, 4));
  scheduler.update(4, {});  // nothing to do
  const StepPlan plan = scheduler.next({});
  EXPECT_EQ(plan.pass,
            (std::vector<PassMember>{{.id = 1, .rows = 1, .decides = true, .most_drafts = 16, .past_pages = 3},
                                     {.id = 3, .rows = 1, .decides = true, .most_drafts = 16, .past_pages = 4}}));
  // A sequence stands in one pass at a time.
  EXPECT_TRUE(scheduler.next({.open_passes = 1}).pass.empty());
  scheduler.update(2, decoding(8, 8, 3));
  EXPECT_TRUE(scheduler.next({.open_passes = 2}).pass.empty()) << "no more passes than that are open";
  EXPECT_EQ(ids(scheduler.next({.open_passes = 1}).pass), Ids{2});
  scheduler.pass_done(1);
  EXPECT_EQ(ids(scheduler.next({.open_passes = 1}).pass), Ids{1});
}

TEST(Scheduler, RowsLogitRowsAndStagingAreNeverExceeded) {
  SchedulerLimits tight = limits();
  Scheduler by_logits = admitted(tight, 4);  // 60 logit rows: two of 25, not three
  for (SeqId id = 1; id <= 3; ++id) {
    by_logits.update(id, decoding(12, 12));
  }
  EXPECT_EQ(ids(by_logits.next({}).pass), (Ids{1, 2}));

  tight.logit_rows = 100;
  Scheduler by_rows = admitted(tight, 4);  // 100 rows: two of 41 and a chunk of 18
  for (SeqId id = 1; id <= 3; ++id) {
    by_rows.update(id, decoding(20, 20));
  }
  by_rows.update(4, prefilling(500));
  const StepPlan plan = by_rows.next({});
  EXPECT_EQ(ids(plan.pass), (Ids{1, 2, 4}));
  EXPECT_EQ(plan.pass.back(), (PassMember{.id = 4, .rows = 18, .decides = false}));

  Scheduler by_staging = admitted(tight, 4);
  by_staging.update(1, decoding(2, 2, 12));
  by_staging.update(2, decoding(2, 2, 9));
  by_staging.update(3, decoding(2, 2, 8));
  EXPECT_EQ(ids(by_staging.next({}).pass), (Ids{1, 3}));
  EXPECT_EQ(ids(by_staging.next({.open_passes = 1}).pass), Ids{2});
}

TEST(Scheduler, PromptsAreReadInChunksAndTheLastDecides) {
  Scheduler scheduler = admitted(limits(), 2);
  scheduler.update(1, prefilling(130));
  scheduler.update(2, prefilling(20));
  EXPECT_EQ(scheduler.next({}).pass, (std::vector<PassMember>{{.id = 1, .rows = 100, .decides = false}}));
  scheduler.pass_done(1);
  scheduler.update(1, prefilling(30, 1));
  EXPECT_EQ(scheduler.next({}).pass, (std::vector<PassMember>{{.id = 1, .rows = 30, .decides = true, .past_pages = 1},
                                                              {.id = 2, .rows = 20, .decides = true}}));
}

TEST(Scheduler, TheLongestUnservedGoesFirst) {
  SchedulerLimits one = limits();
  one.logit_rows = 17;
  Scheduler scheduler = admitted(one, 3);
  Ids order;
  for (int i = 0; i < 9; ++i) {
    for (SeqId id = 1; id <= 3; ++id) {
      scheduler.update(id, decoding(8, 8));
    }
    const StepPlan plan = scheduler.next({});
    ASSERT_EQ(plan.pass.size(), 1u);
    order.push_back(plan.pass[0].id);
    scheduler.pass_done(plan.pass[0].id);
  }
  EXPECT_EQ(order, (Ids{1, 2, 3, 1, 2, 3, 1, 2, 3}));
}

TEST(Scheduler, OpensEarlyOnlyWhenNobodyIsReady) {
  Scheduler scheduler = admitted(limits(), 3);
  scheduler.update(1, decoding(8, 12));
  scheduler.update(2, decoding(3, 12));  // far behind the first
  scheduler.update(3, decoding(5, 12));
  EXPECT_EQ(ids(scheduler.next({}).pass), (Ids{1, 3})) << "who will be ready at about the same time";

  Scheduler behind_another = admitted(limits(), 1);
  behind_another.update(1, decoding(15, 16));
  EXPECT_TRUE(behind_another.next({.open_passes = 1}).pass.empty());

  Scheduler one_ready = admitted(limits(), 2);
  one_ready.update(1, decoding(15, 16));
  one_ready.update(2, decoding(16, 16));
  EXPECT_EQ(ids(one_ready.next({}).pass), Ids{2});

  Scheduler with_prompt = admitted(limits(), 2);
  with_prompt.update(1, decoding(15, 16));
  with_prompt.update(2, prefilling(10));
  EXPECT_EQ(ids(with_prompt.next({}).pass), Ids{2});

  SchedulerLimits no_wire = limits();
  no_wire.staging_pages = 0;
  Scheduler nothing_to_bring = admitted(no_wire, 1);
  nothing_to_bring.update(1, decoding(15, 16));
  EXPECT_TRUE(nothing_to_bring.next({}).pass.empty());
}

TEST(Scheduler, DraftsUpToTheHorizonAndTwiceThatInAPass) {
  SchedulerLimits no_wire = limits();
  no_wire.staging_pages = 0;
  Scheduler scheduler = admitted(no_wire, 1);
  const auto drafts = [&](const Load& load) {
    scheduler.update(1, load);
    return scheduler.next({.open_passes = 2}).draft == Ids{1};
  };
  EXPECT_TRUE(drafts(decoding(0, 8)));
  EXPECT_TRUE(drafts(decoding(7, 8)));
  EXPECT_FALSE(drafts(decoding(8, 8)));
  EXPECT_FALSE(drafts({.backlog = 1, .drafted = 3, .horizon = 8, .most_drafts = 3}));
  EXPECT_FALSE(drafts({.backlog = 1, .drafted = 0, .horizon = 8, .most_drafts = -1}));
  EXPECT_FALSE(drafts(prefilling(2)));
  EXPECT_FALSE(drafts({}));
  scheduler.update(1, decoding(8, 8));
  ASSERT_EQ(ids(scheduler.next({}).pass), Ids{1});
  EXPECT_TRUE(drafts(decoding(15, 8)));
  EXPECT_FALSE(drafts(decoding(16, 8)));
  EXPECT_FALSE(drafts({.backlog = 1, .drafted = 12, .horizon = 8, .most_drafts = 12}));
}

TEST(Scheduler, FullKvModeNeverDrafts) {
  SchedulerLimits full = limits();
  full.drafting = false;
  Scheduler scheduler = admitted(full, 2);
  scheduler.update(1, {.backlog = 1});
  scheduler.update(2, {.backlog = 1, .horizon = 4, .most_drafts = 4});
  const StepPlan plan = scheduler.next({});
  EXPECT_TRUE(plan.draft.empty());
  EXPECT_EQ(plan.pass, (std::vector<PassMember>{{.id = 1, .rows = 1, .decides = true}}));
}

TEST(Scheduler, PromptsAreNotPassedOverForEver) {
  SchedulerLimits one = limits();
  one.pass_rows = 34;
  one.logit_rows = 34;
  Scheduler scheduler = admitted(one, 4);
  int fed = 0;
  for (int plans = 0; plans < 20; ++plans) {  // the other three are always ready and fill every pass
    for (SeqId id = 1; id <= 3; ++id) {
      scheduler.update(id, decoding(8, 8));
    }
    scheduler.update(4, prefilling(1000 - fed));
    for (const PassMember& member : scheduler.next({}).pass) {
      fed += member.id == 4 ? member.rows : 0;
      scheduler.pass_done(member.id);
    }
  }
  EXPECT_GT(fed, 20);
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
    bool admitted = false;
    bool in_pass = false;
    bool cancelled = false;
    bool told = false;    // the scheduler knows its load
    int passed_over = 0;  // passes opened without it while it could have gone
    Load load(int most_horizon) const {
      const bool over = cancelled || tokens >= length;
      return {.backlog = over ? 0 : tokens - verified,
              .drafted = drafted,
              .horizon = horizon,
              .most_drafts = std::min(2 * most_horizon, length - tokens - 1),
              .past_pages = stored_tokens / 64};
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
    const StepPlan plan = scheduler_->next(usage);
    const StepPlan same = twin_->next(usage);
    EXPECT_EQ(plan.admit, same.admit);
    EXPECT_EQ(plan.pass, same.pass);
    EXPECT_EQ(plan.draft, same.draft);
    return plan;
  }

  void check_plan(const StepPlan& plan) {
    for (const SeqId id : plan.admit) {
      ASSERT_FALSE(sequences_.at(id).admitted);
      for (const auto& [other, s] : sequences_) {
        ASSERT_TRUE(other >= id || s.admitted || std::count(plan.admit.begin(), plan.admit.end(), other) > 0)
            << "first come, first served";
      }
      sequences_.at(id).admitted = true;
    }
    Needs reserved;
    int running = 0;
    for (const auto& [id, s] : sequences_) {
      reserved.resident_pages += s.admitted ? s.needs.resident_pages : 0;
      reserved.host_extents += s.admitted ? s.needs.host_extents : 0;
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
      ASSERT_TRUE(limits_.drafting && s.admitted && s.tokens - s.verified == 1);
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
      ASSERT_LE(member.rows, backlog);
      ASSERT_EQ(member.decides, member.rows == backlog);
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
      const bool due = backlog == 1 ? Scheduler::ready(s.load(most_horizon_)) : first_prompt;
      first_prompt = first_prompt && backlog == 1;
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

TEST(Scheduler, RandomTrafficKeepsEveryInvariant) {
  for (uint64_t seed = 1; seed <= 600; ++seed) {
    Simulation(seed).run();
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace vericache
