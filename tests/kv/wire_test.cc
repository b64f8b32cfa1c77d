#include "kv/wire.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "base/hash.h"
#include "kv/throttle.h"
#include "kv_memory.h"
#include "simulated_gpu.h"

namespace vericache {
namespace {

using test::OwnedPool;
using test::random_page_set;
using Clock = std::chrono::steady_clock;

constexpr KvShape kShape{.layers = 5, .kv_heads = 2, .head_dim = 32};
constexpr int kMostPages = 16;  // of a sequence

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// A sequence's page sets as the tail has them, and its place in the host tier.
struct Stored {
  std::vector<std::vector<std::byte>> sets;
  FullKv full;
  Stored(const KvShape& shape, PagePool& extents, PagePool& checksums, int pages, std::mt19937_64& random)
      : full(shape, extents, checksums, pages) {
    for (int i = 0; i < pages; ++i) {
      sets.push_back(random_page_set(shape, random));
    }
  }
  int pages() const { return static_cast<int>(sets.size()); }
  std::vector<const std::byte*> pointers(int first, int last) const {
    std::vector<const std::byte*> out;
    for (int i = first; i < last; ++i) {
      out.push_back(sets[static_cast<size_t>(i)].data());
    }
    return out;
  }
  const std::byte* page(const KvShape& shape, int layer, int page) const {
    return sets[static_cast<size_t>(page)].data() + static_cast<size_t>(layer) * page_bytes(shape);
  }
};

// Who carries: threads, where the device's memory is the host's own, or lanes of a (simulated) GPU.
enum class Carrier { threads, lanes };

struct Link {
  KvShape shape;
  std::mt19937_64 random{17};
  std::unique_ptr<Kernels> cpu = test::make_lane();
  test::SimulatedGpu gpu;
  std::unique_ptr<Device> device;
  std::unique_ptr<Device> host = make_cpu_device(size_t{1} << 20);
  Kernels& lane;  // that reads what was brought
  OwnedPool extents;
  OwnedPool checksums;
  std::vector<std::unique_ptr<Stored>> sequences;
  std::unique_ptr<Wire> wire;  // ends before what it reads and writes

  explicit Link(Carrier carrier, const WireOptions& options, uint64_t seed = 3)
      : shape(kShape),
        gpu(*cpu, seed),
        device(make_memory(carrier, Staging::bytes(shape, options.ring_layers, options.slot_pages))),
        lane(carrier == Carrier::threads ? *cpu : gpu.kernels()),
        extents(extent_bytes(shape), 16 * shape.layers),
        checksums(FullKv::checksum_bytes(shape, kMostPages), 16),
        wire(make_wire(shape, options, *device, *host, lane)) {}
  static std::unique_ptr<Device> make_memory(Carrier carrier, size_t bytes) {
    if (carrier == Carrier::lanes) {
      return std::make_unique<test::SimulatedDevice>(bytes);
    }
    return make_cpu_device(bytes);
  }

  Stored& add(int pages) {
    sequences.push_back(std::make_unique<Stored>(shape, extents.pool, checksums.pool, pages, random));
    return *sequences.back();
  }
  void await_stored(const Stored& sequence, int pages) const {
    for (uint64_t seen = wire->changes(); sequence.full.stored() < pages; seen = wire->changes()) {
      wire->wait_change(seen);
    }
  }
  void store(Stored& sequence) {
    wire->store(sequence.full, 0, sequence.pointers(0, sequence.pages()));
    await_stored(sequence, sequence.pages());
  }
  // Returns when the lane has the layer at hand, proved.
  void await(Fetch& fetch, int layer) {
    wire->wait(fetch, layer);
    wire->await(fetch, layer, lane);
    lane.wait(lane.mark());
  }
  bool staged_equals(const Fetch& fetch, size_t part, const Stored& sequence, int layer) const {
    const FetchPart& p = fetch.parts()[part];
    for (int page = 0; page < p.pages; ++page) {
      if (std::memcmp(wire->staged(fetch, layer, p.first_staged + page), sequence.page(shape, layer, page),
                      page_bytes(shape)) != 0) {
        return false;
      }
    }
    return true;
  }
  // Takes all layers in; true if all parts came as they were stored.
  bool consume(Fetch& fetch, const std::vector<const Stored*>& of) {
    bool equal = true;
    for (int layer = 0; layer < shape.layers; ++layer) {
      await(fetch, layer);
      for (size_t part = 0; part < of.size(); ++part) {
        equal = staged_equals(fetch, part, *of[part], layer) && equal;
      }
      wire->release(fetch, layer, lane);
    }
    return equal;
  }
};

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

// A resident part that holds some tokens of every head as they are.
struct KeptTokens {
  OwnedPool pages;
  OwnedPool index;
  ResidentKv resident;
  KeptTokens(const Stored& sequence, int percent, std::mt19937_64& random)
      : pages(head_page_bytes(KvFormat{}, kShape), sequence.pages() * kShape.layers * kShape.kv_heads),
        index(ResidentIndex::bytes(kShape, sequence.pages(), sequence.pages() * kPageTokens, false), 1),
        resident(kShape, KvFormat{}, pages.pool,
                 {.memory = index.pool.take(),
                  .max_pages = sequence.pages(),
                  .chosen_stride = sequence.pages() * kPageTokens}) {
    for (int layer = 0; layer < kShape.layers; ++layer) {
      for (int head = 0; head < kShape.kv_heads; ++head) {
        keep(sequence, layer, head, test::random_tokens(sequence.pages() * kPageTokens, percent, random));
      }
    }
  }
  std::span<const int> chosen(int layer, int head) const {
    const ResidentLayer& of = resident.layer(layer);
    return {of.chosen() + head * of.chosen_stride(), static_cast<size_t>(of.tokens(head))};
  }

 private:
  void keep(const Stored& sequence, int layer, int head, const std::vector<int>& tokens) {
    ResidentLayer& to = resident.layer(layer);
    ASSERT_TRUE(to.resize(head, static_cast<int>(tokens.size())));
    std::copy(tokens.begin(), tokens.end(), to.chosen() + head * to.chosen_stride());
    for (size_t i = 0; i < tokens.size(); ++i) {
      const std::byte* from = sequence.page(kShape, layer, tokens[i] / kPageTokens) +
                              static_cast<size_t>(head) * head_page_bytes(KvFormat{}, kShape);
      copy_token(from, tokens[i] % kPageTokens, to.head_page(head, static_cast<int>(i) / kPageTokens),
                 static_cast<int>(i) % kPageTokens, kShape);
    }
  }
};

// Overwrites the host's copy of what is resident; returns of how many tokens.
size_t spoil_kept(Stored& sequence, const KeptTokens& kept) {
  const std::vector<std::byte> garbage(page_bytes(kShape), std::byte{0xa5});
  size_t count = 0;
  for (int layer = 0; layer < kShape.layers; ++layer) {
    for (int head = 0; head < kShape.kv_heads; ++head) {
      for (const int token : kept.chosen(layer, head)) {
        copy_token(garbage.data(), 0,
                   sequence.full.page(layer, token / kPageTokens) +
                       static_cast<size_t>(head) * head_page_bytes(KvFormat{}, kShape),
                   token % kPageTokens, kShape);
        ++count;
      }
    }
  }
  return count;
}

TEST(ThreadWire, JoinsResidentTokensWithTheResidual) {
  for (const int percent : {0, 3, 40, 100}) {
    Link link(Carrier::threads, {.ring_layers = 2, .slot_pages = 6});
    Stored& a = link.add(5);
    link.store(a);
    const KeptTokens kept(a, percent, link.random);
    // What is resident need not cross: the host's copy of it is never looked at.
    const size_t count = spoil_kept(a, kept);
    const auto joined = link.wire->fetch({{.full = &a.full, .exact = &kept.resident, .pages = 5, .first_staged = 1}});
    EXPECT_TRUE(link.consume(*joined, {&a})) << percent << " %";
    EXPECT_FALSE(joined->corrupt(0));
    const size_t token_bytes = head_page_bytes(KvFormat{}, kShape) / kPageTokens;
    EXPECT_EQ(joined->bytes(), 5 * page_set_bytes(kShape) - count * token_bytes) << "only dropped tokens cross";

    const auto whole = link.wire->fetch({{.full = &a.full, .pages = 5}});
    EXPECT_EQ(link.consume(*whole, {&a}), count == 0);
    EXPECT_EQ(whole->corrupt(0), count > 0) << "without the resident part the garbage is seen";
  }
}

// Lanes bring pages as they are, whatever is resident.
TEST(LaneWire, EveryTokenCrosses) {
  Link link(Carrier::lanes, {.ring_layers = 2, .slot_pages = 6});
  Stored& a = link.add(5);
  link.store(a);
  const KeptTokens kept(a, 40, link.random);
  const std::vector<FetchPart> parts{{.full = &a.full, .exact = &kept.resident, .pages = 5, .first_staged = 1}};
  const auto whole = link.wire->fetch(parts);
  EXPECT_TRUE(link.consume(*whole, {&a}));
  EXPECT_FALSE(whole->corrupt(0));
  EXPECT_EQ(whole->bytes(), 5 * page_set_bytes(kShape));
  ASSERT_GT(spoil_kept(a, kept), 0u);
  const auto spoilt = link.wire->fetch(parts);
  EXPECT_FALSE(link.consume(*spoilt, {&a}));
  EXPECT_TRUE(spoilt->corrupt(0));
}

TEST(LaneWire, HasNoBandwidthToCap) {
  EXPECT_THROW(Link(Carrier::lanes, {.gbps = 1, .ring_layers = 2, .slot_pages = 6}), UsageError);
}

// The host enqueues all layers at once: a slot is overwritten only behind the lane that reads it, a layer is read only
// behind its transfer. Stores of other pages run beside it. In every order that the lanes allow.
TEST(LaneWire, LanesWaitForEachOtherWhereTheHostDoesNot) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Link link(
        Carrier::lanes,
        {.ring_layers = 1 + static_cast<int>(seed % 3), .slot_pages = 8, .inject_delay_us = seed % 2 == 0 ? 0 : 300},
        seed);
    Stored& a = link.add(5);
    Stored& b = link.add(3);
    Stored& out = link.add(6);
    link.store(a);
    link.store(b);
    std::vector<std::byte> seen;  // (fetches, layers, slot pages)
    const size_t slot_bytes = 8 * page_bytes(kShape);
    constexpr int kFetches = 4;
    seen.resize(kFetches * static_cast<size_t>(kShape.layers) * slot_bytes);
    std::vector<std::shared_ptr<Fetch>> fetches;
    for (int i = 0; i < kFetches; ++i) {
      const bool swapped = i % 2 == 1;
      fetches.push_back(link.wire->fetch({{.full = &a.full, .pages = 5, .first_staged = swapped ? 3 : 0},
                                          {.full = &b.full, .pages = 3, .first_staged = swapped ? 0 : 5}}));
      link.wire->store(out.full, i, out.pointers(i, i + 1));
    }
    std::byte* to = seen.data();
    for (const auto& fetch : fetches) {
      for (int layer = 0; layer < kShape.layers; ++layer, to += slot_bytes) {
        ASSERT_TRUE(link.wire->ready(*fetch, layer)) << "its slot is released, in the order of the lanes";
        link.wire->await(*fetch, layer, link.lane);
        const BlockCopy copy{to, link.wire->staged(*fetch, layer, 0), slot_bytes};
        link.lane.copy({&copy, 1});
        link.wire->release(*fetch, layer, link.lane);
      }
    }
    link.lane.wait(link.lane.mark());
    const std::byte* at = seen.data();
    for (int i = 0; i < kFetches; ++i) {
      for (int layer = 0; layer < kShape.layers; ++layer) {
        for (int page = 0; page < 8; ++page, at += page_bytes(kShape)) {
          const int in_a = i % 2 == 1 ? page - 3 : page;
          const std::byte* expected =
              in_a >= 0 && in_a < 5 ? a.page(kShape, layer, in_a) : b.page(kShape, layer, i % 2 == 1 ? page : page - 5);
          ASSERT_EQ(std::memcmp(at, expected, page_bytes(kShape)), 0)
              << "seed " << seed << " fetch " << i << " layer " << layer << " page " << page;
        }
      }
      ASSERT_FALSE(fetches[static_cast<size_t>(i)]->corrupt(0) || fetches[static_cast<size_t>(i)]->corrupt(1));
      ASSERT_GT(fetches[static_cast<size_t>(i)]->busy_seconds(), 0);
    }
    link.await_stored(out, kFetches);
    EXPECT_EQ(std::memcmp(out.full.page(4, 3), out.page(kShape, 4, 3), page_bytes(kShape)), 0);
  }
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

// A busy machine only ever makes it slower: the best of some attempts tells.
template <typename Attempt>
double best_seconds(double good, const Attempt& attempt) {
  double best = 1e9;
  for (int i = 0; i < 12 && best > good; ++i) {
    best = std::min(best, attempt());
  }
  return best;
}

TEST(ThreadWire, KeepsToItsBandwidthInBothDirections) {
  const size_t bytes = 8 * page_set_bytes(kShape);
  const double expected = 0.03;
  Link link(Carrier::threads,
            {.gbps = static_cast<double>(bytes) / expected * 1e-9, .ring_layers = 3, .slot_pages = 8});
  Stored& a = link.add(8);
  const auto store = [&] {
    const auto begin = Clock::now();
    a.full.set_stored(0);
    link.store(a);
    const double seconds = seconds_since(begin);
    EXPECT_GE(seconds, expected * 0.98);
    return seconds;
  };
  EXPECT_LE(best_seconds(expected * 1.2, store), expected * 1.2);
  const auto fetch = [&] {
    const auto begin = Clock::now();
    const auto brought = link.wire->fetch({{.full = &a.full, .pages = 8}});
    EXPECT_TRUE(link.consume(*brought, {&a}));
    const double seconds = seconds_since(begin);
    EXPECT_GE(seconds, expected * 0.98);
    EXPECT_NEAR(brought->busy_seconds(), seconds, seconds * 0.2);
    return seconds;
  };
  EXPECT_LE(best_seconds(expected * 1.2, fetch), expected * 1.2);
}

TEST(Throttle, ManySmallTransfersRunAtTheLinksSpeed) {
  // 200 transfers of 0.1 ms: a sleep that ends late must not add up.
  const double seconds = best_seconds(0.024, [] {
    Throttle throttle(1.0);
    const auto begin = Clock::now();
    for (int i = 0; i < 200; ++i) {
      throttle.begin();
      throttle.spend(100'000);
    }
    return seconds_since(begin);
  });
  EXPECT_GE(seconds, 0.0199);
  EXPECT_LE(seconds, 0.024);
}

TEST(Throttle, IdleTimeIsNotSavedUp) {
  Throttle throttle(1.0);
  throttle.begin();
  throttle.spend(1'000'000);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const auto begin = Clock::now();
  for (int i = 0; i < 10; ++i) {
    throttle.begin();
    throttle.spend(1'000'000);
  }
  EXPECT_GE(seconds_since(begin), 0.009);
  Throttle open(0);
  open.begin();
  open.spend(size_t{1} << 60);  // no cap: returns at once
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
