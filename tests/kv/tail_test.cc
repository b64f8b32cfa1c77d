#include "kv/tail.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "kv_memory.h"
#include "simulated_gpu.h"

namespace vericache {
namespace {

using test::make_lane;
using test::OwnedPool;

constexpr KvShape kShape{.layers = 3, .kv_heads = 2, .head_dim = 32};

TEST(PagePool, GivesEveryBlockOnceAndThenNull) {
  OwnedPool owned(4096, 5);
  std::set<std::byte*> blocks;
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(owned.pool.free(), 5 - i);
    std::byte* block = owned.pool.take();
    ASSERT_NE(block, nullptr);
    EXPECT_TRUE(blocks.insert(block).second);
  }
  EXPECT_EQ(owned.pool.take(), nullptr);
  EXPECT_EQ(owned.pool.used(), 5);
  EXPECT_EQ(*blocks.rbegin() - *blocks.begin(), 4 * 4096);
  for (std::byte* block : blocks) {
    owned.pool.give(block);
  }
  EXPECT_EQ(owned.pool.used(), 0);
  EXPECT_TRUE(blocks.contains(owned.pool.take()));
}

TEST(PagePoolDeathTest, RefusesWhatItDoesNotOwn) {
  OwnedPool owned(4096, 2);
  OwnedPool other(4096, 2);
  std::byte* mine = owned.pool.take();
  EXPECT_DEATH(owned.pool.give(other.pool.take()), "does not own");
  EXPECT_DEATH(owned.pool.give(mine + 64), "does not own");
  owned.pool.give(mine);
  EXPECT_DEATH(owned.pool.give(mine), "does not own");  // everything is there already
}

bool is_zero(const std::byte* data, size_t bytes) {
  return std::all_of(data, data + bytes, [](std::byte b) { return b == std::byte{0}; });
}

TEST(Tail, GivesBackFromTheEndAndGrowsZeroedAgain) {
  const auto lane = make_lane();
  OwnedPool owned(page_set_bytes(kShape), 5);
  Tail tail(kShape, owned.pool, 5, *lane, nullptr);
  ASSERT_TRUE(tail.grow(300));
  tail.release_before(64);
  std::byte* second = tail.set(1);
  for (int page = 1; page < 5; ++page) {
    std::fill_n(tail.set(page), owned.pool.block_bytes(), std::byte{0xff});
  }
  tail.release_after(320);
  EXPECT_EQ(tail.end(), 320);
  tail.release_after(65);
  EXPECT_EQ(tail.end(), 128);
  EXPECT_EQ(tail.set(1), second);
  EXPECT_FALSE(is_zero(second, owned.pool.block_bytes()));
  EXPECT_EQ(owned.pool.used(), 1);
  ASSERT_TRUE(tail.grow(256));
  for (int page = 2; page < 4; ++page) {
    EXPECT_TRUE(is_zero(tail.set(page), owned.pool.block_bytes()));
    EXPECT_EQ(tail.view(0, 64).head_page(0, page - 1), tail.set(page));
  }
  tail.release_after(64);
  EXPECT_EQ(tail.sets(), 0);
  EXPECT_EQ(tail.position(), 64);
}

TEST(Tail, GrowsInZeroedSetsAndGivesBackFromTheFront) {
  const auto lane = make_lane();
  OwnedPool owned(page_set_bytes(kShape), 6);
  // Blocks that were used before hold what their last owner left.
  std::vector<std::byte*> used;
  while (std::byte* block = owned.pool.take()) {
    std::fill_n(block, owned.pool.block_bytes(), std::byte{0xff});
    used.push_back(block);
  }
  for (std::byte* block : used) {
    owned.pool.give(block);
  }
  Tail tail(kShape, owned.pool, 5, *lane, nullptr);
  EXPECT_EQ(tail.end(), 0);
  EXPECT_TRUE(tail.grow(0));
  EXPECT_EQ(tail.sets(), 0);
  EXPECT_TRUE(tail.grow(1));
  EXPECT_EQ(tail.end(), 64);
  EXPECT_TRUE(tail.grow(64));
  EXPECT_EQ(tail.sets(), 1);
  EXPECT_TRUE(tail.grow(65 + 128));
  EXPECT_EQ(tail.sets(), 4);
  for (int page = 0; page < 4; ++page) {
    EXPECT_TRUE(is_zero(tail.set(page), owned.pool.block_bytes()));
  }
  std::byte* third = tail.set(2);
  tail.release_before(128);
  EXPECT_EQ(tail.position(), 128);
  EXPECT_EQ(tail.end(), 256);
  EXPECT_EQ(tail.set(2), third) << "a set stays where it is";
  EXPECT_EQ(owned.pool.used(), 2);
  tail.release_before(64);  // already given back
  EXPECT_EQ(owned.pool.used(), 2);
  tail.release_before(256);
  EXPECT_EQ(tail.sets(), 0);
  EXPECT_EQ(tail.position(), 256);
  EXPECT_TRUE(tail.grow(257));
  EXPECT_EQ(tail.end(), 320);
  tail.clear();
  EXPECT_EQ(tail.position(), 0);
  EXPECT_EQ(owned.pool.used(), 0);
}

// The pages that attention would read from `position` on, whichever table it reads.
void expect_pages(const Tail& tail, int position) {
  for (int layer = 0; layer < kShape.layers; ++layer) {
    const KvView view = tail.view(layer, position);
    ASSERT_TRUE(view.format.exact());
    for (int head = 0; head < kShape.kv_heads; ++head) {
      for (int page = position / 64; page < tail.end() / 64; ++page) {
        ASSERT_EQ(view.head_page(head, page - position / 64),
                  tail.set(page) + static_cast<size_t>(layer) * page_bytes(kShape) +
                      static_cast<size_t>(head) * head_page_bytes(KvFormat{}, kShape));
      }
    }
  }
}

TEST(Tail, ViewPointsAtEveryHeadPageFromAPositionOn) {
  const auto lane = make_lane();
  OwnedPool index(Tail::index_bytes(kShape, 6), 1);
  std::byte* const table = index.pool.take();
  for (std::byte* memory : {static_cast<std::byte*>(nullptr), table}) {
    OwnedPool owned(page_set_bytes(kShape), 6);
    Tail tail(kShape, owned.pool, 6, *lane, memory);
    ASSERT_TRUE(tail.grow(6 * 64));
    expect_pages(tail, 0);
    tail.release_before(64);
    for (const int position : {64, 128, 320}) {
      expect_pages(tail, position);
      const auto* at = reinterpret_cast<const std::byte*>(tail.view(1, position).head_pages);
      EXPECT_EQ(at >= table && at < table + index.pool.block_bytes(), memory != nullptr);
    }
    ASSERT_TRUE(tail.grow(7 * 64));
    expect_pages(tail, 64);
  }
}

// Sets are cleared, and tables changed, where the lane comes to it: what stands there before may still be in use.
TEST(Tail, ChangesNothingButOnItsLane) {
  const auto cpu = make_lane();
  test::SimulatedGpu gpu(*cpu, 1);
  OwnedPool owned(page_set_bytes(kShape), 3);
  OwnedPool index(Tail::index_bytes(kShape, 3), 1);
  std::byte* block = owned.pool.take();
  std::fill_n(block, owned.pool.block_bytes(), std::byte{0xff});
  owned.pool.give(block);
  Tail tail(kShape, owned.pool, 3, gpu.lane(Kernels::Place::draft), index.pool.take());
  ASSERT_TRUE(tail.grow(64));
  ASSERT_EQ(tail.set(0), block);
  EXPECT_EQ(*block, std::byte{0xff});
  EXPECT_EQ(tail.view(0, 0).head_page(0, 0), nullptr);
  gpu.finish();
  EXPECT_TRUE(is_zero(block, owned.pool.block_bytes()));
  expect_pages(tail, 0);
  ASSERT_TRUE(tail.grow(192));
  tail.release_before(64);
  tail.release_before(128);
  EXPECT_EQ(tail.view(0, 128).head_page(0, 0), block) << "the table of one set holds until the lane is there";
  gpu.finish();
  expect_pages(tail, 128);
}

TEST(Tail, AnEmptyPoolLeavesItAsFarAsItCame) {
  const auto lane = make_lane();
  OwnedPool owned(page_set_bytes(kShape), 3);
  Tail first(kShape, owned.pool, 8, *lane, nullptr);
  Tail second(kShape, owned.pool, 8, *lane, nullptr);
  ASSERT_TRUE(first.grow(64));
  EXPECT_FALSE(second.grow(200));
  EXPECT_EQ(second.sets(), 2);
  EXPECT_EQ(second.end(), 128);
  EXPECT_EQ(second.view(1, 64).head_page(1, 0),
            second.set(1) + page_bytes(kShape) + head_page_bytes(KvFormat{}, kShape));
  EXPECT_TRUE(second.grow(128)) << "what it holds is enough";
  first.clear();
  EXPECT_TRUE(second.grow(192));
  EXPECT_EQ(owned.pool.free(), 0);
  second.clear();
  EXPECT_EQ(owned.pool.used(), 0);

  Tail short_one(kShape, owned.pool, 2, *lane, nullptr);
  EXPECT_FALSE(short_one.grow(129)) << "its own limit";
  EXPECT_EQ(short_one.sets(), 2);
}

// Random growing and releasing of several tails, with tables of the host and of the device: sets are never shared, the
// pool is conserved, views are right.
TEST(Tail, RandomTrafficConservesThePool) {
  std::mt19937_64 random(5);
  const auto lane = make_lane();
  OwnedPool owned(page_set_bytes(kShape), 12);
  OwnedPool index(Tail::index_bytes(kShape, 6), 2);
  {
    std::vector<std::unique_ptr<Tail>> tails;
    for (int i = 0; i < 4; ++i) {
      tails.push_back(std::make_unique<Tail>(kShape, owned.pool, 6, *lane, i % 2 == 0 ? nullptr : index.pool.take()));
    }
    for (int step = 0; step < 4000; ++step) {
      Tail& tail = *tails[random() % tails.size()];
      const auto draw = random() % 10;
      if (draw < 6) {
        const int end = tail.position() + static_cast<int>(random() % 400);
        const bool grown = tail.grow(end);
        ASSERT_EQ(grown, tail.end() >= end);
        ASSERT_TRUE(grown || owned.pool.free() == 0 || tail.sets() == 6);
      } else if (draw < 9) {
        tail.release_before(tail.position() + static_cast<int>(random() % static_cast<uint64_t>(tail.sets() + 1)) * 64);
      } else {
        tail.clear();
      }
      expect_pages(tail, tail.position());
      int held = 0;
      std::set<std::byte*> sets;
      for (const auto& each : tails) {
        held += each->sets();
        for (int page = each->position() / 64; page < each->end() / 64; ++page) {
          ASSERT_TRUE(sets.insert(each->set(page)).second);
        }
      }
      ASSERT_EQ(held, owned.pool.used());
    }
  }
  EXPECT_EQ(owned.pool.used(), 0);
}

}  // namespace
}  // namespace vericache
