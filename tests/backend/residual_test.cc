// Encoded pages: every bit comes back, whatever the values; whatever the bytes, nothing else is touched. On the device
// that VERICACHE_TEST_DEVICE names.
#include <gtest/gtest.h>

#include "backend/residual_pages.h"

namespace vericache::test {
namespace {

struct Case {
  KvShape shape;
  KvFormat format;
  ResidualCode code;
};

std::vector<Case> cases() {
  std::vector<int> head_dims{32, 64, 96, 128};
  if (tested_name() != "cuda") {
    head_dims.insert(head_dims.end(), {16, 80});
  }
  std::vector<Case> out;
  for (const int head_dim : head_dims) {
    const KvShape shape{.layers = 1, .kv_heads = head_dim == 32 ? 5 : 2, .head_dim = head_dim};
    out.push_back({shape, format_of(4, 4), ResidualCode::lossless});
    for (const auto& [keys, values] : {std::pair{2, 2}, {4, 4}, {8, 8}, {8, 4}, {16, 2}, {4, 16}}) {
      out.push_back({shape, format_of(keys, values), ResidualCode::resident});
    }
  }
  return out;
}

double bits_per_value(const KvShape& shape, int pages, size_t bytes) {
  return 8.0 * static_cast<double>(bytes) / (static_cast<double>(pages) * static_cast<double>(page_bytes(shape)) / 2);
}

TEST(Residuals, EveryBitComesBack) {
  Random random(71);
  for (const Case& c : cases()) {
    ResidualPages pages(c.shape, c.format, 3);
    for (int filling = 0; filling < static_cast<int>(Filling::count); ++filling) {
      pages.fill(static_cast<Filling>(filling), random);
      const std::vector<std::byte> coded = pages.encode(c.code);
      ASSERT_FALSE(coded.empty());
      ASSERT_EQ(pages.decode(c.code, coded), pages.values()) << c.shape.head_dim << " dims, bits " << c.format.key_bits
                                                             << ", " << c.format.value_bits << ", filling " << filling;
    }
  }
}

TEST(Residuals, OrdinaryValuesTakeFewBits) {
  Random random(72);
  const KvShape shape{.layers = 1, .kv_heads = 2, .head_dim = 64};
  for (const auto& [bits, most] : {std::pair{8, 5.3}, {4, 9.4}, {2, 11.5}, {16, 11.5}}) {
    ResidualPages pages(shape, format_of(bits == 16 ? 4 : bits, bits == 16 ? 4 : bits), 4);
    pages.fill(Filling::normal, random);
    const size_t bytes = pages.encode(bits == 16 ? ResidualCode::lossless : ResidualCode::resident).size();
    EXPECT_LE(bits_per_value(shape, 4, bytes), most) << bits;
    EXPECT_GT(bits_per_value(shape, 4, bytes), most - 2.5) << bits;
  }
}

// What cannot be coded stays as it is, and costs headers only.
TEST(Residuals, NoiseTakesLittleMoreThanItself) {
  Random random(73);
  const KvShape shape{.layers = 1, .kv_heads = 2, .head_dim = 64};
  for (const ResidualCode code : {ResidualCode::lossless, ResidualCode::resident}) {
    ResidualPages pages(shape, format_of(4, 4), 2);
    pages.fill(Filling::noise, random);
    EXPECT_LE(bits_per_value(shape, 2, pages.encode(code).size()), 16.2);
  }
}

TEST(Residuals, HostileBlocksDoNoHarm) {
  Random random(74);
  for (const Case& c : cases()) {
    ResidualPages pages(c.shape, c.format, 2);
    pages.fill(Filling::sparse, random);
    const std::vector<std::byte> coded = pages.encode(c.code);
    ASSERT_FALSE(coded.empty());
    for (int round = 0; round < 40; ++round) {
      std::vector<std::byte> hostile = coded;
      const int kind = round % 4;
      for (int i = 0; i < (kind == 3 ? static_cast<int>(hostile.size()) : 1 + round); ++i) {
        // A header, a block's table of rows, anywhere; or nothing but noise.
        const int reach = kind == 0 ? 16 : kind == 1 ? 400 : static_cast<int>(hostile.size());
        const auto at = kind == 3 ? static_cast<size_t>(i)
                                  : static_cast<size_t>(random.below(std::min(reach, static_cast<int>(coded.size()))));
        hostile[at] = static_cast<std::byte>(random.below(256));
      }
      ASSERT_FALSE(pages.decode(c.code, hostile).empty());
    }
    ASSERT_EQ(pages.decode(c.code, coded), pages.values());
  }
}

}  // namespace
}  // namespace vericache::test
