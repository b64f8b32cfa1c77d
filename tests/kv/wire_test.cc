#include "kv/wire.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "base/hash.h"
#include "wire_link.h"

namespace vericache {
namespace {

using test::Carrier;
using test::kShape;
using test::Link;
using test::seconds_since;
using test::Stored;
using Clock = std::chrono::steady_clock;

class AnyWire : public testing::TestWithParam<Carrier> {};
INSTANTIATE_TEST_SUITE_P(Carriers, AnyWire, testing::Values(Carrier::threads, Carrier::lanes),
                         [](const auto& info) { return info.param == Carrier::threads ? "Threads" : "Lanes"; });

TEST_P(AnyWire, BringsBackWhatItTookOut) {
  Link link(GetParam(), {.ring_layers = 3, .slot_pages = 12});
  Stored& a = link.add(3);
  Stored& b = link.add(1);
  Stored& c = link.add(7);
  link.wire->store(a.full, 0, a.pointers(0, 1));
  link.wire->store(b.full, 0, b.pointers(0, 1));
  link.wire->store(c.full, 0, c.pointers(0, 7));
  link.wire->store(a.full, 1, a.pointers(1, 3));
  EXPECT_TRUE(GetParam() == Carrier::threads || link.wire->stores_pending(a.full));
  for (const Stored* each : {&a, &b, &c}) {
    link.await_stored(*each, each->pages());
  }
  EXPECT_FALSE(link.wire->stores_pending(a.full));
  EXPECT_EQ(link.wire->bytes_out(), 11 * page_set_bytes(kShape));
  for (int layer = 0; layer < kShape.layers; ++layer) {
    EXPECT_EQ(a.full.checksum(layer, 2), hash_bytes(a.page(kShape, layer, 2), page_bytes(kShape)));
  }

  const auto all = link.wire->fetch({{.full = &a.full, .pages = 3, .first_staged = 0},
                                     {.full = &b.full, .pages = 1, .first_staged = 3},
                                     {.full = &c.full, .pages = 7, .first_staged = 4}});
  const auto some = link.wire->fetch({{.full = &c.full, .pages = 5, .first_staged = 2}});
  const auto nothing = link.wire->fetch({{.full = &b.full, .pages = 0, .first_staged = 0}});
  EXPECT_TRUE(link.consume(*all, {&a, &b, &c}));
  EXPECT_TRUE(link.consume(*some, {&c}));
  EXPECT_TRUE(link.consume(*nothing, {&b}));
  EXPECT_EQ(all->bytes(), 11 * page_set_bytes(kShape));
  EXPECT_EQ(some->bytes(), 5 * page_set_bytes(kShape));
  EXPECT_EQ(nothing->bytes(), 0u);
  EXPECT_EQ(link.wire->bytes_in(), 16 * page_set_bytes(kShape));
  EXPECT_EQ(link.wire->corrupt_blocks(), 0u);
  EXPECT_FALSE(all->corrupt(0) || all->corrupt(1) || all->corrupt(2));
  EXPECT_GT(all->busy_seconds(), 0);
}

TEST_P(AnyWire, TheViewOfAPartIsItsPagesInTheSlot) {
  Link link(GetParam(), {.ring_layers = 2, .slot_pages = 9});
  Stored& a = link.add(4);
  Stored& b = link.add(5);
  link.store(a);
  link.store(b);
  const auto fetch = link.wire->fetch(
      {{.full = &a.full, .pages = 4, .first_staged = 5}, {.full = &b.full, .pages = 5, .first_staged = 0}});
  for (int layer = 0; layer < kShape.layers; ++layer) {
    link.await(*fetch, layer);
    for (const FetchPart& part : fetch->parts()) {
      const KvView view = link.wire->staged_view(*fetch, layer, part);
      EXPECT_TRUE(view.format.exact());
      for (int head = 0; head < kShape.kv_heads; ++head) {
        EXPECT_EQ(view.tokens[head], part.pages * kPageTokens);
        for (int page = 0; page < part.pages; ++page) {
          EXPECT_EQ(view.head_page(head, page), link.wire->staged(*fetch, layer, part.first_staged + page) +
                                                    static_cast<size_t>(head) * head_page_bytes(KvFormat{}, kShape));
        }
      }
    }
    link.wire->release(*fetch, layer, link.lane);
  }
}

TEST_P(AnyWire, NeverRunsFurtherAheadThanTheRing) {
  for (const int ring : {2, 3}) {
    Link link(GetParam(), {.ring_layers = ring, .slot_pages = 4});
    Stored& a = link.add(4);
    Stored& b = link.add(2);
    link.store(a);
    link.store(b);
    std::vector<std::pair<std::shared_ptr<Fetch>, const Stored*>> queue;
    for (int i = 0; i < 6; ++i) {
      const Stored& which = i % 2 == 0 ? a : b;
      queue.emplace_back(link.wire->fetch({{.full = &which.full, .pages = which.pages()}}), &which);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    for (size_t i = 0; i < queue.size(); ++i) {
      Fetch& fetch = *queue[i].first;
      for (int layer = 0; layer < kShape.layers; ++layer) {
        link.await(fetch, layer);
        // A consumer that takes its time: meanwhile nothing overwrites what it reads.
        std::this_thread::sleep_for(std::chrono::microseconds(link.random() % 700));
        if (GetParam() == Carrier::lanes) {
          link.gpu.finish();
        }
        const size_t ahead = i * kShape.layers + static_cast<size_t>(layer + ring);
        if (ahead / kShape.layers < queue.size()) {
          const Fetch& later = *queue[ahead / kShape.layers].first;
          ASSERT_FALSE(link.wire->arrived(later, static_cast<int>(ahead % kShape.layers)));
          ASSERT_FALSE(link.wire->ready(later, static_cast<int>(ahead % kShape.layers)));
        }
        ASSERT_TRUE(link.staged_equals(fetch, 0, *queue[i].second, layer)) << "ring " << ring << " fetch " << i;
        link.wire->release(fetch, layer, link.lane);
      }
    }
  }
}

using AnyWireDeathTest = AnyWire;
INSTANTIATE_TEST_SUITE_P(Carriers, AnyWireDeathTest, testing::Values(Carrier::threads, Carrier::lanes),
                         [](const auto& info) { return info.param == Carrier::threads ? "Threads" : "Lanes"; });

TEST_P(AnyWireDeathTest, RefusesAnOrderAndSizesThatCannotBe) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Link link(GetParam(), {.ring_layers = 3, .slot_pages = 4});
  Stored& a = link.add(4);
  EXPECT_DEATH(link.wire->fetch({{.full = &a.full, .pages = 4, .first_staged = 1}}), "staging slot");
  EXPECT_DEATH(link.wire->store(a.full, 1, a.pointers(0, 4)), "room reserved");
  EXPECT_DEATH(
      {
        const auto fetch = link.wire->fetch({{.full = &a.full, .pages = 0}});
        link.await(*fetch, 1);
        link.wire->release(*fetch, 1, link.lane);
      },
      "in order");
}

TEST_P(AnyWire, AChangedBitIsFlaggedForItsPartOnly) {
  Link link(GetParam(), {.ring_layers = 3, .slot_pages = 9});
  Stored& a = link.add(3);
  Stored& b = link.add(3);
  Stored& c = link.add(3);
  for (Stored* each : {&a, &b, &c}) {
    link.store(*each);
  }
  for (int i = 0; i < 40; ++i) {
    const int layer = static_cast<int>(link.random() % kShape.layers);
    std::byte* byte = b.full.page(layer, static_cast<int>(link.random() % 3)) + link.random() % page_bytes(kShape);
    const std::byte bit{static_cast<uint8_t>(1u << link.random() % 8)};
    *byte ^= bit;
    const uint64_t before = link.wire->corrupt_blocks();
    const auto fetch = link.wire->fetch({{.full = &a.full, .pages = 3, .first_staged = 6},
                                         {.full = &b.full, .pages = 3, .first_staged = 0},
                                         {.full = &c.full, .pages = 3, .first_staged = 3}});
    for (int l = 0; l < kShape.layers; ++l) {
      link.await(*fetch, l);
      if (l >= layer) {
        ASSERT_TRUE(fetch->corrupt(1)) << "known as soon as the layer is there";
      }
      link.wire->release(*fetch, l, link.lane);
    }
    ASSERT_FALSE(fetch->corrupt(0));
    ASSERT_FALSE(fetch->corrupt(2));
    ASSERT_EQ(link.wire->corrupt_blocks(), before + 1);
    *byte ^= bit;
  }
}

TEST_P(AnyWire, InjectedCorruptionIsAlwaysSeen) {
  Link link(GetParam(), {.ring_layers = 3, .slot_pages = 8, .inject_corruption_every = 7});
  Stored& a = link.add(8);
  link.store(a);
  const auto fetch = link.wire->fetch({{.full = &a.full, .pages = 8}});
  EXPECT_FALSE(link.consume(*fetch, {&a}));
  EXPECT_TRUE(fetch->corrupt(0));
  EXPECT_EQ(link.wire->corrupt_blocks(), static_cast<uint64_t>(8 * kShape.layers / 7));
}

TEST_P(AnyWire, DelaysChangeNothing) {
  Link link(GetParam(), {.ring_layers = 2, .slot_pages = 6, .inject_delay_us = 2000});
  std::vector<Stored*> all;
  for (const int pages : {1, 6, 3, 2}) {
    all.push_back(&link.add(pages));
    link.wire->store(all.back()->full, 0, all.back()->pointers(0, pages));
  }
  for (int round = 0; round < 6; ++round) {
    Stored& s = *all[link.random() % all.size()];
    link.await_stored(s, s.pages());
    const auto fetch = link.wire->fetch({{.full = &s.full, .pages = s.pages()}});
    EXPECT_TRUE(link.consume(*fetch, {&s}));
  }
}

// Stores of one sequence run out while another's full KV comes in, as in the engine.
TEST_P(AnyWire, BothDirectionsAtOnce) {
  Link link(GetParam(), {.ring_layers = 3, .slot_pages = 10});
  Stored& a = link.add(10);
  Stored& b = link.add(10);
  link.store(b);
  for (int page = 0; page < 10; ++page) {
    link.wire->store(a.full, page, a.pointers(page, page + 1));
    const int there = a.full.stored();
    const auto fetch = link.wire->fetch(
        {{.full = &a.full, .pages = there}, {.full = &b.full, .pages = 10 - there, .first_staged = there}});
    ASSERT_TRUE(link.consume(*fetch, {&a, &b}));
    ASSERT_FALSE(fetch->corrupt(0));
  }
  link.await_stored(a, 10);
}

TEST_P(AnyWire, EndsWithRequestsPending) {
  for (int round = 0; round < 12; ++round) {
    const bool slow = round % 2 == 1 && GetParam() == Carrier::threads;
    Link link(GetParam(),
              {.gbps = slow ? 0.5 : 0.0, .ring_layers = 2, .slot_pages = 4, .inject_delay_us = round % 3 * 200},
              static_cast<uint64_t>(round));
    Stored& a = link.add(4);
    Stored& b = link.add(4);
    link.store(a);
    std::vector<std::shared_ptr<Fetch>> fetches;
    for (int i = 0; i < 4; ++i) {
      fetches.push_back(link.wire->fetch({{.full = &a.full, .pages = 4}}));
      link.wire->store(b.full, i, b.pointers(i, i + 1));
    }
    if (round % 4 == 0) {
      link.wire->wait(*fetches[0], 0);  // and never release it
    }
    const auto begin = Clock::now();
    link.wire = nullptr;
    EXPECT_LT(seconds_since(begin), 5.0);
  }
}

}  // namespace
}  // namespace vericache
