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

struct Way {
  Carrier carrier;
  ResidualCode code;
  bool stores = false;
};
class AnyWire : public testing::TestWithParam<Way> {
 protected:
  // A link of these options that carries in this way.
  static WireOptions with_code(WireOptions options) {
    options.code = GetParam().code;
    options.coded_share = 0.5;
    options.stores = GetParam().stores;
    return options;
  }
};
const auto kWays = testing::Values(
    Way{Carrier::threads, ResidualCode::plain}, Way{Carrier::lanes, ResidualCode::plain},
    Way{Carrier::threads, ResidualCode::lossless}, Way{Carrier::lanes, ResidualCode::lossless},
    Way{Carrier::threads, ResidualCode::resident}, Way{Carrier::lanes, ResidualCode::resident},
    Way{Carrier::threads, ResidualCode::plain, true}, Way{Carrier::lanes, ResidualCode::plain, true},
    Way{Carrier::threads, ResidualCode::resident, true}, Way{Carrier::lanes, ResidualCode::resident, true});
std::string way_name(const testing::TestParamInfo<Way>& info) {
  return std::string(info.param.carrier == Carrier::threads ? "Threads" : "Lanes") +
         (info.param.code == ResidualCode::plain      ? "Plain"
          : info.param.code == ResidualCode::lossless ? "Lossless"
                                                      : "Resident") +
         (info.param.stores ? "Store" : "");
}
INSTANTIATE_TEST_SUITE_P(Ways, AnyWire, kWays, way_name);

TEST_P(AnyWire, BringsBackWhatItTookOut) {
  Link link(GetParam().carrier, with_code({.ring_layers = 3, .slot_pages = 12}));
  Stored& a = link.add(3);
  Stored& b = link.add(1);
  Stored& c = link.add(7);
  link.store(a, 0, 1);
  link.store(b, 0, 1);
  link.store(c, 0, 7);
  link.store(a, 1, 3);
  EXPECT_TRUE(GetParam().carrier == Carrier::threads || link.wire->stores_pending(a.full));
  for (const Stored* each : {&a, &b, &c}) {
    link.await_stored(*each, each->pages());
  }
  EXPECT_FALSE(link.wire->stores_pending(a.full));
  EXPECT_EQ(link.wire->bytes_out(), a.bytes(3) + b.bytes(1) + c.bytes(7));
  if (GetParam().code == ResidualCode::plain) {
    EXPECT_EQ(c.bytes(7), 7 * page_set_bytes(kShape));
  } else {
    EXPECT_LT(c.bytes(7), 6 * page_set_bytes(kShape));
  }
  for (int layer = 0; layer < kShape.layers; ++layer) {
    EXPECT_EQ(a.full.checksum(layer, 2), hash_bytes(a.page(kShape, layer, 2), page_bytes(kShape)));
  }

  const auto all = link.wire->fetch({a.part(3, 0), b.part(1, 3), c.part(7, 4)});
  const auto some = link.wire->fetch({c.part(5, 2)});
  const auto nothing = link.wire->fetch({b.part(0, 0)});
  EXPECT_TRUE(link.consume(*all, {&a, &b, &c}));
  EXPECT_TRUE(link.consume(*some, {&c}));
  EXPECT_TRUE(link.consume(*nothing, {&b}));
  // Lanes are told where encoded pages end: a unit a part.
  const bool told = GetParam().carrier == Carrier::lanes && GetParam().code != ResidualCode::plain;
  const size_t ends = told ? kResidualUnit * static_cast<size_t>(kShape.layers) : 0;
  EXPECT_EQ(all->bytes(), a.bytes(3) + b.bytes(1) + c.bytes(7) + 4 * ends);
  EXPECT_EQ(some->bytes(), c.bytes(5) + 2 * ends);
  EXPECT_EQ(nothing->bytes(), 0u);
  EXPECT_EQ(link.wire->bytes_in(), all->bytes() + some->bytes());
  EXPECT_EQ(link.wire->corrupt_blocks(), 0u);
  EXPECT_FALSE(all->corrupt(0) || all->corrupt(1) || all->corrupt(2));
  EXPECT_GT(all->busy_seconds(), 0);
}

TEST_P(AnyWire, TheViewOfAPartIsItsPagesInTheSlot) {
  Link link(GetParam().carrier, with_code({.ring_layers = 2, .slot_pages = 9}));
  Stored& a = link.add(4);
  Stored& b = link.add(5);
  link.store(a);
  link.store(b);
  const auto fetch = link.wire->fetch({a.part(4, 5), b.part(5, 0)});
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
    Link link(GetParam().carrier, with_code({.ring_layers = ring, .slot_pages = 4}));
    Stored& a = link.add(4);
    Stored& b = link.add(2);
    link.store(a);
    link.store(b);
    std::vector<std::pair<std::shared_ptr<Fetch>, const Stored*>> queue;
    for (int i = 0; i < 6; ++i) {
      const Stored& which = i % 2 == 0 ? a : b;
      queue.emplace_back(link.wire->fetch({which.part(which.pages())}), &which);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    for (size_t i = 0; i < queue.size(); ++i) {
      Fetch& fetch = *queue[i].first;
      for (int layer = 0; layer < kShape.layers; ++layer) {
        link.await(fetch, layer);
        // A consumer that takes its time: meanwhile nothing overwrites what it reads.
        std::this_thread::sleep_for(std::chrono::microseconds(link.random() % 700));
        if (GetParam().carrier == Carrier::lanes) {
          link.gpu.finish();
        }
        const size_t ahead = i * kShape.layers + static_cast<size_t>(layer + ring);
        // Encoded layers wait in a ring of bytes, which holds as many as it holds.
        const bool slots = GetParam().carrier == Carrier::threads || GetParam().code == ResidualCode::plain;
        if (slots && ahead / kShape.layers < queue.size()) {
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

TEST_P(AnyWire, AChangedResidentPartIsFlagged) {
  if (GetParam().code != ResidualCode::resident) {
    GTEST_SKIP() << "nothing is joined";
  }
  Link link(GetParam().carrier, with_code({.ring_layers = 2, .slot_pages = 4}));
  Stored& a = link.add(4);
  link.store(a);
  *a.resident->layer(2).head_page(1, 3) ^= std::byte{0x10};
  const auto fetch = link.wire->fetch({a.part(4)});
  EXPECT_FALSE(link.consume(*fetch, {&a}));
  EXPECT_TRUE(fetch->corrupt(0));
  EXPECT_EQ(link.wire->corrupt_blocks(), 1u);
}

using AnyWireDeathTest = AnyWire;
INSTANTIATE_TEST_SUITE_P(Ways, AnyWireDeathTest, kWays, way_name);

TEST_P(AnyWireDeathTest, RefusesAnOrderAndSizesThatCannotBe) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Link link(GetParam().carrier, with_code({.ring_layers = 3, .slot_pages = 4}));
  Stored& a = link.add(4);
  EXPECT_DEATH(link.wire->fetch({a.part(4, 1)}), "staging slot");
  EXPECT_DEATH(link.wire->store(a.full, 1, a.pointers(0, 4)), "room reserved");
  EXPECT_DEATH(
      {
        const auto fetch = link.wire->fetch({a.part(0)});
        link.await(*fetch, 1);
        link.wire->release(*fetch, 1, link.lane);
      },
      "in order");
}

TEST_P(AnyWire, AChangedBitIsFlaggedForItsPartOnly) {
  Link link(GetParam().carrier, with_code({.ring_layers = 3, .slot_pages = 9}));
  Stored& a = link.add(3);
  Stored& b = link.add(3);
  Stored& c = link.add(3);
  for (Stored* each : {&a, &b, &c}) {
    link.store(*each);
  }
  for (int i = 0; i < 40; ++i) {
    const int layer = static_cast<int>(link.random() % kShape.layers);
    // Of an encoded page, a byte of its first row: padding may change and nothing is lost.
    const bool coded = GetParam().code != ResidualCode::plain;
    const size_t offset = coded ? 50 + link.random() % 100 : link.random() % page_bytes(kShape);
    const size_t at = b.full.begin(layer, static_cast<int>(link.random() % 3)) + offset;
    const int bit = static_cast<int>(link.random() % 8);
    b.full.flip_bit(layer, at, bit);
    const uint64_t before = link.wire->corrupt_blocks();
    const auto fetch = link.wire->fetch({a.part(3, 6), b.part(3, 0), c.part(3, 3)});
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
    b.full.flip_bit(layer, at, bit);
  }
}

TEST_P(AnyWire, InjectedCorruptionIsAlwaysSeen) {
  Link link(GetParam().carrier, with_code({.ring_layers = 3, .slot_pages = 8, .inject_corruption_every = 7}));
  Stored& a = link.add(8);
  link.store(a);
  const auto fetch = link.wire->fetch({a.part(8)});
  EXPECT_FALSE(link.consume(*fetch, {&a}));
  EXPECT_TRUE(fetch->corrupt(0));
  // Of encoded pages a bit of padding may be hit.
  const auto hit = static_cast<uint64_t>(8 * kShape.layers / 7);
  EXPECT_LE(link.wire->corrupt_blocks(), hit);
  EXPECT_GE(link.wire->corrupt_blocks(), GetParam().code == ResidualCode::plain ? hit : 1);
}

// What a store does not give, or has not taken, is seen as damage of that sequence alone.
TEST_P(AnyWire, AStoreThatFailsIsDamage) {
  if (!GetParam().stores) {
    GTEST_SKIP() << "nothing is in a store";
  }
  for (const bool writes : {false, true}) {
    Link link(GetParam().carrier, with_code({.ring_layers = 2, .slot_pages = 8}));
    Stored& a = link.add(4);
    Stored& b = link.add(4);
    link.store_of_others->fail_writes(writes ? 3 : 0);
    link.store(a);
    link.store(b);
    link.store_of_others->fail_reads(writes ? 0 : 3);
    const auto fetch = link.wire->fetch({a.part(4), b.part(4, 4)});
    EXPECT_FALSE(link.consume(*fetch, {&a, &b}));
    EXPECT_TRUE(fetch->corrupt(0));
    EXPECT_FALSE(fetch->corrupt(1));
    link.store_of_others->fail_writes(0);
    link.store_of_others->fail_reads(0);
    a.full.set_stored(0);
    link.store(a);  // anew
    const auto again = link.wire->fetch({a.part(4), b.part(4, 4)});
    EXPECT_TRUE(link.consume(*again, {&a, &b}));
  }
}

TEST_P(AnyWire, DelaysChangeNothing) {
  Link link(GetParam().carrier, with_code({.ring_layers = 2, .slot_pages = 6, .inject_delay_us = 2000}));
  std::vector<Stored*> all;
  for (const int pages : {1, 6, 3, 2}) {
    all.push_back(&link.add(pages));
    link.store(*all.back(), 0, pages);
  }
  for (int round = 0; round < 6; ++round) {
    Stored& s = *all[link.random() % all.size()];
    link.await_stored(s, s.pages());
    const auto fetch = link.wire->fetch({s.part(s.pages())});
    EXPECT_TRUE(link.consume(*fetch, {&s}));
  }
}

// Stores of one sequence run out while another's full KV comes in, as in the engine.
TEST_P(AnyWire, BothDirectionsAtOnce) {
  Link link(GetParam().carrier, with_code({.ring_layers = 3, .slot_pages = 10}));
  Stored& a = link.add(10);
  Stored& b = link.add(10);
  link.store(b);
  for (int page = 0; page < 10; ++page) {
    link.store(a, page, page + 1);
    const int there = a.full.stored();
    const auto fetch = link.wire->fetch({a.part(there), b.part(10 - there, there)});
    ASSERT_TRUE(link.consume(*fetch, {&a, &b}));
    ASSERT_FALSE(fetch->corrupt(0));
  }
  link.await_stored(a, 10);
}

TEST_P(AnyWire, EndsWithRequestsPending) {
  for (int round = 0; round < 12; ++round) {
    const bool slow = round % 2 == 1 && GetParam().carrier == Carrier::threads;
    Link link(
        GetParam().carrier,
        with_code({.gbps = slow ? 0.5 : 0.0, .ring_layers = 2, .slot_pages = 4, .inject_delay_us = round % 3 * 200}),
        static_cast<uint64_t>(round));
    Stored& a = link.add(4);
    Stored& b = link.add(4);
    link.store(a);
    std::vector<std::shared_ptr<Fetch>> fetches;
    for (int i = 0; i < 4; ++i) {
      fetches.push_back(link.wire->fetch({a.part(4)}));
      link.store(b, i, i + 1);
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
