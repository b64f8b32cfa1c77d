#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "kv/resident.h"
#include "kv_memory.h"
#include "memory_store.h"
#include "simulated_gpu.h"

namespace vericache {
namespace {

using test::make_lane;
using test::OwnedPool;

constexpr KvShape kShape{.layers = 3, .kv_heads = 2, .head_dim = 32};

// What a device that cannot read the host's tables finds in memory of its own.
struct OwnedIndex {
  OwnedPool memory;
  ResidentIndex index;
  OwnedIndex(int max_pages, int chosen_stride, bool mirrored)
      : memory(ResidentIndex::bytes(kShape, max_pages, chosen_stride, mirrored), 1),
        index{memory.pool.take(), max_pages, chosen_stride, mirrored} {}
};

// For tests of one layer on a device that reads the host's tables.
ResidentLayer make_layer(const KvFormat& format, PagePool& pool, int max_pages) {
  return ResidentLayer(kShape, format, pool, {.memory = nullptr, .max_pages = max_pages}, 0);
}

TEST(ResidentLayer, HeadsHaveLengthsOfTheirOwn) {
  const KvFormat format{.key_bits = 4, .value_bits = 2};
  OwnedPool owned(head_page_bytes(format, kShape), 10);
  ResidentLayer layer = make_layer(format, owned.pool, 5);
  ASSERT_TRUE(layer.resize(0, 130));
  ASSERT_TRUE(layer.resize(1, 64));
  EXPECT_EQ(layer.tokens(0), 130);
  EXPECT_EQ(layer.tokens(1), 64);
  EXPECT_EQ(layer.pages(), 4);
  EXPECT_EQ(owned.pool.used(), 4);
  const KvView view = layer.view();
  EXPECT_EQ(view.format, format);
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
  ResidentLayer layer = make_layer(KvFormat{}, owned.pool, 8);
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
  OwnedIndex index(2, 100, false);
  {
    ResidentLayer from(kShape, KvFormat{}, owned.pool, index.index, 1);
    ASSERT_TRUE(from.resize(1, 100));
    from.chosen()[100 + 99] = 321;
    std::byte* page = from.head_page(1, 1);
    const ResidentLayer to(std::move(from));
    EXPECT_EQ(to.tokens(1), 100);
    EXPECT_EQ(to.head_page(1, 1), page);
    EXPECT_EQ(to.chosen()[100 + 99], 321);
    EXPECT_EQ(to.chosen_stride(), 100);
    EXPECT_EQ(to.view().head_page(1, 1), page);
    EXPECT_EQ(owned.pool.used(), 2);
  }
  EXPECT_EQ(owned.pool.used(), 0) << "one of the two gives the pages back, once";
}

TEST(ResidentLayer, RandomResizingConservesThePool) {
  std::mt19937_64 random(11);
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 9);
  {
    ResidentLayer layer = make_layer(KvFormat{}, owned.pool, 6);
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
  ResidentLayer layer = make_layer(KvFormat{}, owned.pool, 2);
  EXPECT_DEATH(layer.resize(0, 129), "reserved");
  OwnedPool small(head_page_bytes(KvFormat{}, kShape) / 2, 4);
  EXPECT_DEATH(make_layer(KvFormat{}, small.pool, 2), "fit the pool");
}

TEST(ResidentKv, CountsTheBytesOfThePagesThatItHolds) {
  const KvFormat format{.key_bits = 2, .value_bits = 8};
  OwnedPool owned(head_page_bytes(format, kShape), 40);
  {
    ResidentKv resident(kShape, format, owned.pool, {.memory = nullptr, .max_pages = 4});
    ASSERT_TRUE(resident.layer(0).resize(0, 200));
    ASSERT_TRUE(resident.layer(2).resize(1, 1));
    EXPECT_EQ(resident.bytes(), 5 * head_page_bytes(format, kShape));
    EXPECT_EQ(owned.pool.used(), 5);
    resident.clear();
    EXPECT_EQ(resident.bytes(), 0u);
    EXPECT_EQ(resident.layer(0).tokens(0), 0);
    EXPECT_EQ(owned.pool.used(), 0);
    ASSERT_TRUE(resident.layer(1).resize(0, 64));
  }
  EXPECT_EQ(owned.pool.used(), 0);
}

// Drafts go on while a pass compresses layer after layer: what they see changes for all layers at once.
TEST(ResidentKv, AttentionSeesTheCountsOfTheLastSettle) {
  const auto lane = make_lane();
  for (const bool mirrored : {false, true}) {
    OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 40);
    OwnedIndex index(4, 0, mirrored);
    ResidentKv resident(kShape, KvFormat{}, owned.pool, index.index);
    const auto expect_counts = [&](int layer, int first, int second) {
      EXPECT_EQ(resident.layer(layer).view().tokens[0], first);
      EXPECT_EQ(resident.layer(layer).view().tokens[1], second);
    };
    for (int layer = 0; layer < kShape.layers; ++layer) {
      ASSERT_TRUE(resident.layer(layer).resize(0, 130));
      ASSERT_TRUE(resident.layer(layer).resize(1, 64 + layer));
      resident.layer(layer).publish(*lane);
      EXPECT_EQ(resident.layer(layer).tokens(0), 130);
      expect_counts(layer, 0, 0);
    }
    resident.settle(*lane);
    for (int layer = 0; layer < kShape.layers; ++layer) {
      expect_counts(layer, 130, 64 + layer);
    }
    ASSERT_TRUE(resident.layer(1).resize(0, 7));
    ASSERT_TRUE(resident.layer(2).resize(1, 200));
    expect_counts(0, 130, 64);
    expect_counts(1, 130, 65);
    expect_counts(2, 130, 66);
    resident.settle(*lane);
    expect_counts(0, 130, 64);
    expect_counts(1, 7, 65);
    expect_counts(2, 130, 200);
    resident.clear();
    resident.settle(*lane);
    expect_counts(1, 0, 0);
  }
}

// A device that cannot read the host's tables has its own: they follow at publish and settle, on the lanes given.
TEST(ResidentKv, TablesOfTheDeviceFollowOnTheirLanes) {
  const auto cpu = make_lane();
  test::SimulatedGpu gpu(*cpu, 2);
  Kernels& pass = gpu.lane(Kernels::Place::pass);
  Kernels& draft = gpu.lane(Kernels::Place::draft);
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 40);
  OwnedIndex index(4, 30, true);
  ResidentKv resident(kShape, KvFormat{}, owned.pool, index.index);
  const auto in_index = [&](const void* at) {
    const auto* byte = static_cast<const std::byte*>(at);
    return byte >= index.index.memory && byte < index.index.memory + index.memory.pool.block_bytes();
  };
  std::set<const void*> places;  // of tables, counts and choices: none is another's
  for (int i = 0; i < kShape.layers; ++i) {
    ResidentLayer& layer = resident.layer(i);
    const KvView view = layer.view();
    for (const void* at : {static_cast<const void*>(view.head_pages), static_cast<const void*>(view.tokens),
                           static_cast<const void*>(layer.chosen())}) {
      EXPECT_TRUE(in_index(at));
      EXPECT_TRUE(places.insert(at).second);
    }
    EXPECT_EQ(view.page_stride, 4);
    std::fill_n(layer.chosen(), kShape.kv_heads * layer.chosen_stride(), 1000 + i);
    ASSERT_TRUE(layer.resize(0, 30));
    ASSERT_TRUE(layer.resize(1, 70 + i));
    layer.publish(pass);
    EXPECT_EQ(view.head_page(1, 1), nullptr) << "the pass has not come to it";
    pass.wait(pass.mark());
    for (const auto& [head, page] : {std::pair{0, 0}, {1, 0}, {1, 1}}) {
      EXPECT_EQ(view.head_page(head, page), layer.head_page(head, page));
    }
  }
  resident.settle(draft);
  EXPECT_EQ(resident.layer(2).view().tokens[1], 0);
  gpu.finish();
  for (int i = 0; i < kShape.layers; ++i) {
    EXPECT_EQ(resident.layer(i).view().tokens[0], 30);
    EXPECT_EQ(resident.layer(i).view().tokens[1], 70 + i);
    const int* chosen = resident.layer(i).chosen();
    EXPECT_TRUE(std::all_of(chosen, chosen + 2 * 30, [&](int token) { return token == 1000 + i; }));
  }
}

TEST(ResidentKv, AnAddressableDeviceNeedsAnIndexForChosenTokensOnly) {
  EXPECT_EQ(ResidentIndex::bytes(kShape, 4, 0, false), 0u);
  EXPECT_GE(ResidentIndex::bytes(kShape, 4, 50, false), 3 * 2 * 50 * sizeof(int));
  OwnedPool owned(head_page_bytes(KvFormat{}, kShape), 4);
  OwnedIndex index(4, 50, false);
  ResidentKv resident(kShape, KvFormat{}, owned.pool, index.index);
  EXPECT_EQ(resident.layer(0).chosen(), reinterpret_cast<int*>(index.index.memory));
  EXPECT_EQ(resident.layer(2).chosen() - resident.layer(1).chosen(), 2 * 50);
  EXPECT_EQ(make_layer(KvFormat{}, owned.pool, 4).chosen(), nullptr);
}

// The pages of a layer are a stream; where they begin and end is known once they have their places.
TEST(FullKv, PagesLieInTheirLayersExtentsOneBehindTheOther) {
  std::mt19937_64 random(6);
  for (const KvShape& shape : {kShape, KvShape{5, 8, 128}, KvShape{2, 1, 16}}) {
    EXPECT_GE(extent_bytes(shape), size_t{1} << 20);
    EXPECT_EQ(extent_bytes(shape) % page_bytes(shape), 0u);
    const int in_extent = static_cast<int>(extent_bytes(shape) / page_bytes(shape));
    EXPECT_EQ(extents_for(in_extent, shape, ResidualCode::plain), shape.layers);
    EXPECT_EQ(extents_for(0, shape, ResidualCode::plain), 0);
    for (const ResidualCode code : {ResidualCode::plain, ResidualCode::lossless}) {
      const int pages = in_extent + 3;  // two extents a layer
      const int extents = extents_for(pages, shape, code);
      EXPECT_EQ(extents, 2 * shape.layers);
      OwnedPool owned(extent_bytes(shape), extents + 1);
      OwnedPool records(FullKv::record_bytes(shape, pages), 2);
      {
        FullKv full(shape, code, owned.pool, records.pool, pages);
        EXPECT_EQ(owned.pool.used(), extents);
        EXPECT_EQ(records.pool.used(), 1);
        EXPECT_EQ(full.stored(), 0);
        std::map<std::byte*, size_t> pieces;
        for (int layer = 0; layer < shape.layers; ++layer) {
          for (int page = 0; page < pages; ++page) {
            const size_t bytes = code == ResidualCode::plain
                                     ? page_bytes(shape)
                                     : (1 + random() % (residual_bound(shape) / kResidualUnit)) * kResidualUnit;
            full.place(layer, page, bytes);
            EXPECT_EQ(full.end(layer, page) - full.begin(layer, page), bytes);
            size_t next = full.begin(layer, page);
            full.for_each_piece(layer, next, full.end(layer, page), [&](std::byte* at, size_t offset, size_t count) {
              EXPECT_EQ(offset, next);
              EXPECT_TRUE(pieces.emplace(at, count).second);
              next += count;
            });
            EXPECT_EQ(next, full.end(layer, page));
            full.checksum(layer, page) = static_cast<uint64_t>(layer * 1000 + page);
          }
        }
        for (int layer = 0; layer < shape.layers; ++layer) {
          EXPECT_EQ(full.ends(layer)[pages - 1] * kResidualUnit, full.end(layer, pages - 1));
          for (int page = 0; page < pages; ++page) {
            EXPECT_EQ(std::as_const(full).checksum(layer, page), static_cast<uint64_t>(layer * 1000 + page));
            EXPECT_EQ(full.checksums(layer)[page], static_cast<uint64_t>(layer * 1000 + page));
          }
        }
        for (auto at = pieces.begin(); std::next(at) != pieces.end(); ++at) {
          EXPECT_GE(std::next(at)->first - at->first, static_cast<ptrdiff_t>(at->second)) << "pieces do not overlap";
        }
      }
      EXPECT_EQ(owned.pool.used(), 0);
      EXPECT_EQ(records.pool.used(), 0);
    }
  }
}

// Wherever the extents are, a layer's stream is one: written in pieces, read in others, against a plain array.
TEST(FullKv, BytesComeBackFromHostMemoryAndFromAStore) {
  constexpr int kPages = 300;
  const int extents = extents_for(kPages, kShape, ResidualCode::plain);
  EXPECT_GT(extents, 2 * kShape.layers);
  OwnedPool records(FullKv::record_bytes(kShape, kPages), 2);
  OwnedPool pool(extent_bytes(kShape), extents);
  test::MemoryStore store(extent_bytes(kShape), extents + 1);
  std::mt19937_64 random(9);
  {
    FullKv in_memory(kShape, ResidualCode::plain, pool.pool, records.pool, kPages);
    FullKv in_store(kShape, ResidualCode::plain, store, records.pool, kPages);
    EXPECT_FALSE(in_memory.in_store());
    EXPECT_TRUE(in_store.in_store());
    EXPECT_EQ(store.free(), 1);
    for (FullKv* full : {&in_memory, &in_store}) {
      const size_t size = kPages * page_bytes(kShape);
      std::vector<std::vector<std::byte>> layers(static_cast<size_t>(kShape.layers), std::vector<std::byte>(size));
      for (size_t layer = 0; layer < layers.size(); ++layer) {
        EXPECT_TRUE(full->write(static_cast<int>(layer), 0, layers[layer]));
      }
      for (int i = 0; i < 60; ++i) {
        const size_t layer = random() % layers.size();
        const size_t begin = random() % size;
        const size_t count = random() % (size - begin) / (1 + random() % 500);
        const auto written = layers[layer].begin() + static_cast<ptrdiff_t>(begin);
        std::generate_n(written, count, [&] { return static_cast<std::byte>(random()); });
        EXPECT_TRUE(full->write(static_cast<int>(layer), begin, {written, count}));
        layers[layer][begin] ^= std::byte{0x20};
        full->flip_bit(static_cast<int>(layer), begin, 5);
        const size_t from = random() % size;
        std::vector<std::byte> read(size - from);
        EXPECT_TRUE(full->read(static_cast<int>(layer), from, read));
        EXPECT_TRUE(std::equal(read.begin(), read.end(), layers[layer].begin() + static_cast<ptrdiff_t>(from)));
      }
    }
    store.fail_reads(1);
    store.fail_writes(1);
    std::vector<std::byte> some(3 * page_bytes(kShape));
    EXPECT_FALSE(in_store.read(1, 0, some));
    EXPECT_FALSE(in_store.write(1, 0, some));
    EXPECT_TRUE(in_memory.read(1, 0, some));
  }
  EXPECT_EQ(store.free(), store.count());
  EXPECT_EQ(pool.pool.used(), 0);
}

// What pages turn out not to need goes back, in steps, and never what those to come may take.
TEST(FullKv, GivesBackWhatCodedPagesLeave) {
  constexpr int kPages = 400;
  const int extents = extents_for(kPages, kShape, ResidualCode::lossless);
  const int of_layer = extents / kShape.layers;
  ASSERT_GT(of_layer, 5);
  OwnedPool records(FullKv::record_bytes(kShape, kPages), 2);
  OwnedPool pool(extent_bytes(kShape), extents);
  test::MemoryStore store(extent_bytes(kShape), extents);
  const size_t bound = residual_bound(kShape);
  {
    FullKv in_memory(kShape, ResidualCode::lossless, pool.pool, records.pool, kPages);
    FullKv in_store(kShape, ResidualCode::lossless, store, records.pool, kPages);
    for (FullKv* full : {&in_memory, &in_store}) {
      const auto free = [&] { return full->in_store() ? store.free() : pool.pool.free(); };
      EXPECT_EQ(full->extents(), extents);
      EXPECT_EQ(full->shrink(), 0) << "nothing is known yet";
      const auto store_pages = [&](int end, size_t bytes) {
        for (int page = full->stored(); page < end; ++page) {
          for (int layer = 0; layer < kShape.layers; ++layer) {
            full->place(layer, page, bytes);
          }
        }
        full->set_stored(end);
      };
      store_pages(100, bound);
      EXPECT_EQ(full->shrink(), 0) << "they took all that they may";
      int given = 0;
      for (int end = 150; end <= kPages; end += 50) {
        store_pages(end, bound / 4 / kResidualUnit * kResidualUnit);
        given += full->shrink();
        EXPECT_EQ(full->extents(), extents - given);
        EXPECT_EQ(free(), given);
        const size_t most = full->begin(0, end) + static_cast<size_t>(kPages - end) * bound;
        const auto has = static_cast<size_t>(full->extents() / kShape.layers) * extent_bytes(kShape);
        EXPECT_GE(has, most);
        EXPECT_LT(has - most, extent_bytes(kShape));
        EXPECT_EQ(full->shrink(), 0);
      }
      EXPECT_GT(given, extents / 3);
      std::vector<std::byte> page(full->end(1, kPages - 1) - full->begin(1, kPages - 1), std::byte{3});
      EXPECT_TRUE(full->write(1, full->begin(1, kPages - 1), page));
      std::vector<std::byte> back(page.size());
      EXPECT_TRUE(full->read(1, full->begin(1, kPages - 1), back));
      EXPECT_EQ(back, page);

      full->vacate();
      EXPECT_EQ(full->stored(), 0);
      EXPECT_EQ(full->extents(), 0);
      EXPECT_EQ(free(), extents);
      full->occupy();
      EXPECT_EQ(full->extents(), extents);
      store_pages(1, bound);
      full->shrink();
      EXPECT_EQ(free(), 0);
    }
  }
  EXPECT_EQ(store.free(), extents);
  EXPECT_EQ(pool.pool.free(), extents);
}

TEST(FullKvDeathTest, NeedsABlockOfRecordsThatIsLargeEnough) {
  OwnedPool owned(extent_bytes(kShape), extents_for(10, kShape, ResidualCode::plain));
  OwnedPool small(FullKv::record_bytes(kShape, 9), 1);
  EXPECT_DEATH(FullKv(kShape, ResidualCode::plain, owned.pool, small.pool, 10), "records");
  OwnedPool none(FullKv::record_bytes(kShape, 10), 1);
  none.pool.take();
  EXPECT_DEATH(FullKv(kShape, ResidualCode::plain, owned.pool, none.pool, 10), "records");
}

// Host memory whose first bytes alone have been pinned by now.
class PartlyPinned final : public Device {
 public:
  PartlyPinned() : Device(0) {}
  std::string_view name() const override { return "partly pinned"; }
  bool addressable() const override { return true; }
  std::unique_ptr<Device> make_host_memory(size_t) override { return nullptr; }
  size_t ready(const std::byte* asked, size_t bytes) const override {
    EXPECT_EQ(asked, block) << "extents are blocks of one allocation";
    return std::min(bytes, pinned);
  }
  void write(std::byte*, const void*, size_t) override {}
  void read(void*, const std::byte*, size_t) const override {}

  const std::byte* block = nullptr;
  size_t pinned = 0;

 private:
  std::byte* take(size_t) override { return nullptr; }
};

TEST(FullKv, IsReachableWhenItsLastExtentIsPinned) {
  const int pages = static_cast<int>(extent_bytes(kShape) / page_bytes(kShape));
  OwnedPool owned(extent_bytes(kShape), 3 * extents_for(pages, kShape, ResidualCode::plain));
  OwnedPool records(FullKv::record_bytes(kShape, pages), 2);
  PartlyPinned host;
  host.block = owned.pool.memory();
  const FullKv first(kShape, ResidualCode::plain, owned.pool, records.pool, pages);
  const FullKv second(kShape, ResidualCode::plain, owned.pool, records.pool, pages);
  const size_t half = extent_bytes(kShape) * static_cast<size_t>(kShape.layers);
  for (const auto& [pinned, first_there, second_there] : {std::tuple{size_t{0}, false, false},
                                                          {half - 1, false, false},
                                                          {half, true, false},
                                                          {2 * half - 1, true, false},
                                                          {2 * half, true, true},
                                                          {3 * half, true, true}}) {
    host.pinned = pinned;
    EXPECT_EQ(first.reachable(host), first_there);
    EXPECT_EQ(second.reachable(host), second_there);
  }
  const auto plain = make_cpu_device(0);
  EXPECT_TRUE(second.reachable(*plain));
}

}  // namespace
}  // namespace vericache
