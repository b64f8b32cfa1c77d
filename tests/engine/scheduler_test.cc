#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>

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
  return {.backlog = 1,
          .drafted = drafted,
          .horizon = horizon,
          .reach = horizon,
          .most_drafts = 100,
          .past_pages = past_pages};
}
Load prefilling(int backlog, int past_pages = 0) {
  return {.backlog = backlog, .drafted = 0, .horizon = 8, .reach = 8, .most_drafts = 16, .past_pages = past_pages};
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

// What a sequence turns out not to need is the next one's.
TEST(Scheduler, ExtentsThatAreGivenBackAdmitOthers) {
  Scheduler scheduler(limits());
  scheduler.enqueue(1, {.host_extents = 30});
  scheduler.enqueue(2, {.host_extents = 30});
  EXPECT_EQ(scheduler.next({}).admit, Ids{1});
  scheduler.release_extents(1, 9);
  EXPECT_FALSE(scheduler.admits());
  EXPECT_TRUE(scheduler.next({}).admit.empty());
  scheduler.release_extents(1, 1);
  EXPECT_TRUE(scheduler.admits());
  EXPECT_EQ(scheduler.free_host_extents(), 30);
  EXPECT_EQ(scheduler.next({}).admit, Ids{2});
  EXPECT_FALSE(scheduler.admits()) << "nobody waits";
  EXPECT_EQ(scheduler.free_host_extents(), 0);
  scheduler.release_extents(2, 30);
  scheduler.remove(1);
  scheduler.remove(2);
  EXPECT_EQ(scheduler.free_host_extents(), 50);
}

TEST(Scheduler, WhoLosesItsExtentsHasThemAnewBeforeOthersAreAdmitted) {
  Scheduler scheduler(limits());
  scheduler.enqueue(1, {.host_extents = 30});
  scheduler.enqueue(2, {.host_extents = 30});
  scheduler.enqueue(3, {.host_extents = 5});
  EXPECT_EQ(scheduler.next({}).admit, Ids{1});
  scheduler.release_extents(1, 20);
  EXPECT_EQ(scheduler.next({}).admit, (Ids{2, 3}));
  scheduler.enqueue(4, {.host_extents = 5});
  scheduler.readmit(1);
  EXPECT_EQ(scheduler.free_host_extents(), 15);
  StepPlan plan = scheduler.next({});
  EXPECT_TRUE(plan.readmit.empty());
  EXPECT_TRUE(plan.admit.empty()) << "4 would fit, but does not overtake";
  EXPECT_FALSE(scheduler.admits());
  scheduler.readmit(2);
  EXPECT_TRUE(scheduler.admits());
  plan = scheduler.next({});
  EXPECT_EQ(plan.readmit, Ids{1}) << "no two wait for what the other has";
  EXPECT_TRUE(plan.admit.empty());
  scheduler.remove(2);  // while it waits
  plan = scheduler.next({});
  EXPECT_TRUE(plan.readmit.empty());
  EXPECT_EQ(plan.admit, Ids{4});
  EXPECT_EQ(scheduler.free_host_extents(), 10);
  for (const SeqId id : {1, 3, 4}) {
    scheduler.remove(id);
  }
  EXPECT_EQ(scheduler.free_host_extents(), 50);
}

TEST(Scheduler, WhoHasNoRoomInHostMemoryGoesToTheStore) {
  SchedulerLimits with_store = limits();
  with_store.store_extents = 60;
  Scheduler scheduler(with_store);
  scheduler.enqueue(1, {.host_extents = 30});
  scheduler.enqueue(2, {.host_extents = 30});  // 20 are left in host memory
  scheduler.enqueue(3, {.host_extents = 20});  // those
  scheduler.enqueue(4, {.host_extents = 31});  // 30 are left in the store
  EXPECT_EQ(scheduler.next({}).admit, (Ids{1, 2, 3}));
  EXPECT_FALSE(scheduler.in_store(1));
  EXPECT_TRUE(scheduler.in_store(2));
  EXPECT_FALSE(scheduler.in_store(3));
  EXPECT_EQ(scheduler.free_host_extents(), 0);
  EXPECT_EQ(scheduler.free_store_extents(), 30);
  scheduler.remove(2);
  EXPECT_EQ(scheduler.free_store_extents(), 60);
  EXPECT_EQ(scheduler.next({}).admit, Ids{4});
  EXPECT_TRUE(scheduler.in_store(4));
  scheduler.remove(1);
  EXPECT_EQ(scheduler.free_host_extents(), 30);
  scheduler.enqueue(5, {.host_extents = 55});  // more than host memory ever has
  EXPECT_TRUE(scheduler.next({}).admit.empty());
  scheduler.remove(4);
  EXPECT_EQ(scheduler.next({}).admit, Ids{5});
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

// Where the wire is the bottleneck it is given the next one in turn, ready or not, also behind an open pass, and nobody
// stops drafting at the horizon.
TEST(Scheduler, AWireThatIsTheBottleneckNeverIdles) {
  SchedulerLimits tight = limits();
  tight.staging_pages = 4;
  tight.pass_rows = tight.logit_rows = 128;
  Scheduler scheduler = admitted(tight, 3);
  for (const SeqId id : {1, 2, 3}) {
    scheduler.update(id, decoding(5, 8, 3));
  }
  const auto opened = [&](const Usage& usage) {
    const StepPlan plan = scheduler.next(usage);
    return plan.pass.empty() ? SeqId{0} : plan.pass.front().id;
  };
  EXPECT_EQ(opened({.open_passes = 0, .wire_bound = true}), 1u);
  EXPECT_EQ(opened({.open_passes = 1, .wire_bound = false}), 0u);
  EXPECT_EQ(opened({.open_passes = 1, .wire_bound = true}), 2u);
  EXPECT_EQ(opened({.open_passes = 2, .wire_bound = true}), 0u);
  scheduler.update(3, decoding(9, 8, 3));
  EXPECT_EQ(scheduler.next({.open_passes = 2, .wire_bound = true}).draft, (Ids{1, 2, 3}));
  EXPECT_EQ(scheduler.next({.open_passes = 2, .wire_bound = false}).draft, (Ids{1, 2}));
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

// A context that is replayed stands in passes as a prompt does, decides nothing, and neither drafts nor is verified.
TEST(Scheduler, AContextIsReplayedBeforeItDrafts) {
  const auto replaying = [](int rows, int past_pages) {
    Load load = decoding(0, 8, past_pages);
    load.replay = rows;
    return load;
  };
  EXPECT_FALSE(Scheduler::ready({.backlog = 1, .drafted = 9, .horizon = 8, .reach = 8, .most_drafts = 9, .replay = 1}));
  Scheduler scheduler = admitted(limits(), 3);
  scheduler.update(1, replaying(130, 3));
  scheduler.update(2, decoding(8, 8, 4));
  scheduler.update(3, prefilling(30));
  StepPlan plan = scheduler.next({});
  EXPECT_EQ(plan.pass,
            (std::vector<PassMember>{{.id = 2, .rows = 1, .decides = true, .most_drafts = 16, .past_pages = 4},
                                     {.id = 1, .rows = 83, .decides = false, .past_pages = 3, .replays = true}}));
  EXPECT_EQ(plan.draft, Ids{2});
  scheduler.pass_done(1);
  scheduler.pass_done(2);
  scheduler.update(1, replaying(47, 3));
  scheduler.update(2, decoding(0, 8, 4));
  // Held, sequences are still made ready to decode.
  scheduler.hold_decoding(true);
  plan = scheduler.next({});
  EXPECT_EQ(plan.pass,
            (std::vector<PassMember>{{.id = 1, .rows = 47, .decides = false, .past_pages = 3, .replays = true},
                                     {.id = 3, .rows = 30, .decides = true}}));
  EXPECT_EQ(plan.draft, Ids{});
  scheduler.hold_decoding(false);
  scheduler.pass_done(1);
  scheduler.update(1, decoding(0, 8, 3));
  EXPECT_EQ(scheduler.next({.open_passes = 2}).draft, (Ids{1, 2}));
  // Staging binds it as it does others.
  scheduler.update(1, replaying(47, 21));
  scheduler.pass_done(3);
  scheduler.update(3, {});
  EXPECT_TRUE(scheduler.next({}).pass.empty());
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
  EXPECT_FALSE(drafts({.backlog = 1, .drafted = 3, .horizon = 8, .reach = 8, .most_drafts = 3}));
  EXPECT_FALSE(drafts({.backlog = 1, .drafted = 0, .horizon = 8, .reach = 8, .most_drafts = -1}));
  EXPECT_FALSE(drafts(prefilling(2)));
  EXPECT_FALSE(drafts({}));
  scheduler.update(1, decoding(8, 8));
  ASSERT_EQ(ids(scheduler.next({}).pass), Ids{1});
  EXPECT_TRUE(drafts(decoding(15, 8)));
  EXPECT_FALSE(drafts(decoding(16, 8)));
  EXPECT_FALSE(drafts({.backlog = 1, .drafted = 12, .horizon = 8, .reach = 8, .most_drafts = 12}));
}

// Where drafts are weighed a count makes ready at last only; doubt does before, and the most doubtful goes first.
TEST(Scheduler, VerifiesWhoIsInDoubt) {
  const auto weighed = [](int drafted, double chance) {
    Load load = decoding(drafted, 8, 3);
    load.reach = 64;
    load.chance = chance;
    load.least_chance = 0.5;
    return load;
  };
  EXPECT_FALSE(Scheduler::ready(weighed(63, 0.5)));
  EXPECT_TRUE(Scheduler::ready(weighed(64, 1)));
  EXPECT_TRUE(Scheduler::ready(weighed(1, 0.49)));

  SchedulerLimits tight = limits();
  tight.staging_pages = 4;  // one at a time
  tight.logit_rows = tight.pass_rows = 256;
  for (const bool wire_bound : {false, true}) {
    Scheduler scheduler = admitted(tight, 3);
    scheduler.update(1, weighed(20, 0.4));
    scheduler.update(2, weighed(2, 0.1));
    scheduler.update(3, weighed(40, 0.9));
    const StepPlan plan = scheduler.next({.wire_bound = wire_bound});
    EXPECT_EQ(ids(plan.pass), Ids{2});
    // Who waits for a pass drafts on only where that costs nothing.
    EXPECT_EQ(plan.draft, wire_bound ? (Ids{1, 2, 3}) : (Ids{2, 3}));
    EXPECT_EQ(ids(scheduler.next({.open_passes = 1, .wire_bound = wire_bound}).pass), Ids{1});
    scheduler.pass_done(1);
    scheduler.pass_done(2);
    // The wire brings nothing for drafts that likely stand where it is the bottleneck; else it begins early.
    scheduler.update(1, weighed(5, 0.95));
    scheduler.update(2, weighed(0, 1));
    const std::vector<PassMember> early = scheduler.next({.wire_bound = wire_bound}).pass;
    ASSERT_EQ(ids(early), wire_bound ? Ids{} : Ids{3});
    if (!early.empty()) {
      EXPECT_EQ(early[0].most_drafts, 64) << "it may draft so many before it is in doubt";
    }
  }
  // Several share the rows that there are.
  Scheduler sharing = admitted(limits(), 3);
  for (const SeqId id : {1, 2, 3}) {
    sharing.update(id, weighed(0, 1));
  }
  const std::vector<PassMember> all = sharing.next({}).pass;
  ASSERT_EQ(ids(all), (Ids{1, 2, 3}));
  for (const PassMember& member : all) {
    EXPECT_EQ(member.most_drafts, 60 / 3 - 1);
  }
}

TEST(Scheduler, FullKvModeNeverDrafts) {
  SchedulerLimits full = limits();
  full.drafting = false;
  Scheduler scheduler = admitted(full, 2);
  scheduler.update(1, {.backlog = 1});
  scheduler.update(2, {.backlog = 1, .horizon = 4, .reach = 4, .most_drafts = 4});
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

}  // namespace
}  // namespace vericache
