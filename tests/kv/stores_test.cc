#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "kv/resident.h"
#include "kv_memory.h"

namespace vericache {
namespace {

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

TEST(Tail, GrowsInZeroedSetsAndGivesBackFromTheFront) {
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
  Tail tail(kShape, owned.pool, 5);
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

TEST(Tail, ViewPointsAtEveryHeadPageFromAPositionOn) {
  OwnedPool owned(page_set_bytes(kShape), 6);
  Tail tail(kShape, owned.pool, 6);
  ASSERT_TRUE(tail.grow(6 * 64));
  tail.release_before(64);
  for (const int position : {64, 128, 320}) {
    for (int layer = 0; layer < kShape.layers; ++layer) {
      const KvView view = tail.view(layer, position);
      EXPECT_TRUE(view.format.exact());
      for (int head = 0; head < kShape.kv_heads; ++head) {
        for (int page = position / 64; page < 6; ++page) {
          EXPECT_EQ(view.head_page(head, page - position / 64),
                    tail.set(page) + static_cast<size_t>(layer) * page_bytes(kShape) +
                        static_cast<size_t>(head) * head_page_bytes(KvFormat{}, kShape));
        }
      }
    }
  }
}

TEST(Tail, AnEmptyPoolLeavesItAsFarAsItCame) {
  OwnedPool owned(page_set_bytes(kShape), 3);
  Tail first(kShape, owned.pool, 8);
  Tail second(kShape, owned.pool, 8);
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

  Tail short_one(kShape, owned.pool, 2);
  EXPECT_FALSE(short_one.grow(129)) << "its own limit";
  EXPECT_EQ(short_one.sets(), 2);
}

// Random growing and releasing of several tails: sets are never shared, the pool is conserved, contents stay.
TEST(Tail, RandomTrafficConservesThePool) {
  std::mt19937_64 random(5);
  OwnedPool owned(page_set_bytes(kShape), 12);
  {
    std::vector<std::unique_ptr<Tail>> tails;
    for (int i = 0; i < 4; ++i) {
      tails.push_back(std::make_unique<Tail>(kShape, owned.pool, 6));
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

TEST(ResidentLayer, HeadsHaveLengthsOfTheirOwn) {
  const KvFormat format{.key_bits = 4, .value_bits = 2};
  OwnedPool owned(head_page_bytes(format, kShape), 10);
  ResidentLayer layer(kShape, format, owned.pool, 5);
  ASSERT_TRUE(layer.resize(0, 130));
  ASSERT_TRUE(layer.resize(1, 64));
  EXPECT_EQ(layer.tokens(0), 130);
  EXPECT_EQ(layer.tokens(1), 64);
  EXPECT_EQ(layer.pages(), 4);
  EXPECT_EQ(owned.pool.used(), 4);
  const KvView view = layer.view();
  EXPECT_EQ(view.format, format);
  EXPECT_EQ(view.tokens[0], 130);
  EXPECT_EQ(view.tokens[1], 64);
  EXPECT_EQ(view.head_page(0, 2), layer.head_page(0, 2));
  EXPECT_EQ(view.head_page(1, 0), layer.head_page(1, 0));

  *layer.head_page(0, 0) = std::byte{7};
  std::byte* stays = layer.head_page(0, 1);
  ASSERT_TRUE(layer.resize(0, 65));
  EXPECT_EQ(layer.pages(), 3);
  EXPECT_EQ(layer.head_page(0, 1), stays);
  ASSERT_TRUE(layer.resize(0, 300));
  EXPECT_EQ(layer.pages(), 6);
  EXPECT_EQ(layer.head_page(0, 1), stays);
  EXPECT_EQ(*layer.head_page(0, 0), std::byte{7});
  ASSERT_TRUE(layer.resize(0, 0));
  EXPECT_EQ(owned.pool.used(), 1);
  layer.clear();
  EXPECT_EQ(owned.pool.used(), 0);
  EXPECT_EQ(layer.tokens(1), 0);
}

TEST(ResidentLayer, AnEmptyPoolLeavesNothingLostOrDoubled) {
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 4);
  ResidentLayer layer(kShape, KvFormat{}, owned.pool, 8);
  ASSERT_TRUE(layer.resize(0, 10));
  EXPECT_FALSE(layer.resize(0, 400));
  EXPECT_EQ(owned.pool.free(), 0);
  EXPECT_EQ(layer.pages(), 4);
  EXPECT_FALSE(layer.resize(1, 1));
  EXPECT_EQ(layer.tokens(1), 0);
  ASSERT_TRUE(layer.resize(0, 129));
  EXPECT_EQ(owned.pool.used(), 3);
  ASSERT_TRUE(layer.resize(1, 1));
  std::set<std::byte*> blocks{layer.head_page(0, 0), layer.head_page(0, 1), layer.head_page(0, 2),
                              layer.head_page(1, 0)};
  EXPECT_EQ(blocks.size(), 4u);
  layer.clear();
  EXPECT_EQ(owned.pool.used(), 0);
}

TEST(ResidentLayer, MovesWithItsPages) {
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 4);
  {
    ResidentLayer from(kShape, KvFormat{}, owned.pool, 2);
    ASSERT_TRUE(from.resize(1, 100));
    from.positions(1).assign({1, 2, 3});
    std::byte* page = from.head_page(1, 1);
    const ResidentLayer to(std::move(from));
    EXPECT_EQ(to.tokens(1), 100);
    EXPECT_EQ(to.head_page(1, 1), page);
    EXPECT_EQ(to.positions(1).size(), 3u);
    EXPECT_EQ(to.view().head_page(1, 1), page);
    EXPECT_EQ(owned.pool.used(), 2);
  }
  EXPECT_EQ(owned.pool.used(), 0) << "one of the two gives the pages back, once";
}

TEST(ResidentLayer, RandomResizingConservesThePool) {
  std::mt19937_64 random(11);
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 9);
  {
    ResidentLayer layer(kShape, KvFormat{}, owned.pool, 6);
    for (int step = 0; step < 5000; ++step) {
      const int head = static_cast<int>(random() % 2);
      const int tokens = static_cast<int>(random() % 385);
      if (layer.resize(head, tokens)) {
        ASSERT_EQ(layer.tokens(head), tokens);
      } else {
        ASSERT_EQ(owned.pool.free(), 0);
      }
      ASSERT_EQ(layer.pages(), owned.pool.used());
      std::set<std::byte*> blocks;
      for (int h = 0; h < 2; ++h) {
        for (int page = 0; page < (layer.tokens(h) + 63) / 64; ++page) {
          ASSERT_TRUE(blocks.insert(layer.head_page(h, page)).second);
        }
      }
    }
  }
  EXPECT_EQ(owned.pool.used(), 0);
}

TEST(ResidentLayerDeathTest, RefusesMoreThanWasReserved) {
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 4);
  ResidentLayer layer(kShape, KvFormat{}, owned.pool, 2);
  EXPECT_DEATH(layer.resize(0, 129), "reserved");
  OwnedPool small(head_page_bytes(KvFormat{}, kShape) / 2, 4);
  EXPECT_DEATH(ResidentLayer(kShape, KvFormat{}, small.pool, 2), "fit the pool");
}

TEST(ResidentKv, CountsTheBytesOfThePagesThatItHolds) {
  const KvFormat format{.key_bits = 2, .value_bits = 8};
  OwnedPool owned(head_page_bytes(format, kShape), 40);
  {
    ResidentKv resident(kShape, format, owned.pool, 200);
    ASSERT_TRUE(resident.layer(0).resize(0, 200));
    ASSERT_TRUE(resident.layer(2).resize(1, 1));
    EXPECT_EQ(resident.bytes(), 5 * head_page_bytes(format, kShape));
    EXPECT_EQ(owned.pool.used(), 5);
    resident.layer(2).positions(1).push_back(0);
    resident.clear();
    EXPECT_EQ(resident.bytes(), 0u);
    EXPECT_TRUE(resident.layer(2).positions(1).empty());
    EXPECT_EQ(owned.pool.used(), 0);
    ASSERT_TRUE(resident.layer(1).resize(0, 64));
  }
  EXPECT_EQ(owned.pool.used(), 0);
}

TEST(FullKv, PagesOfALayerLieTogetherInExtentsOfAMebibyteOrMore) {
  for (const KvShape& shape : {kShape, KvShape{5, 8, 128}, KvShape{2, 1, 16}}) {
    EXPECT_GE(extent_bytes(shape), size_t{1} << 20);
    EXPECT_EQ(extent_bytes(shape) % page_bytes(shape), 0u);
    const int pages = extent_pages(shape) + 3;  // two extents a layer
    const int extents = extents_for(pages, shape);
    EXPECT_EQ(extents, 2 * shape.layers);
    EXPECT_EQ(extents_for(extent_pages(shape), shape), shape.layers);
    EXPECT_EQ(extents_for(0, shape), 0);
    OwnedPool owned(extent_bytes(shape), extents + 1);
    {
      FullKv full(shape, owned.pool, pages);
      EXPECT_EQ(owned.pool.used(), extents);
      EXPECT_EQ(full.stored(), 0);
      std::set<std::byte*> seen;
      for (int layer = 0; layer < shape.layers; ++layer) {
        for (int page = 0; page < pages; ++page) {
          EXPECT_TRUE(seen.insert(full.page(layer, page)).second);
          if (page % extent_pages(shape) != 0) {
            EXPECT_EQ(full.page(layer, page) - full.page(layer, page - 1), static_cast<ptrdiff_t>(page_bytes(shape)));
          }
          full.checksum(layer, page) = static_cast<uint64_t>(layer * 1000 + page);
        }
      }
      for (int layer = 0; layer < shape.layers; ++layer) {
        for (int page = 0; page < pages; ++page) {
          EXPECT_EQ(std::as_const(full).checksum(layer, page), static_cast<uint64_t>(layer * 1000 + page));
        }
      }
      for (auto at = seen.begin(); std::next(at) != seen.end(); ++at) {
        EXPECT_GE(*std::next(at) - *at, static_cast<ptrdiff_t>(page_bytes(shape))) << "pages do not overlap";
      }
    }
    EXPECT_EQ(owned.pool.used(), 0);
  }
}

}  // namespace
}  // namespace vericache
