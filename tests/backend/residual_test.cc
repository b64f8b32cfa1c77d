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
    for (const auto& [keys, values] : {std::pair{2, 2}, {4, 4}, {8, 8}, {8, 4}, {16, 2}, {4, 16}, {3, 6}, {6, 3}}) {
      out.push_back({shape, format_of(keys, values), ResidualCode::resident});
    }
    for (const auto& [keys, values] : {std::pair{2, 2}, {3, 3}, {4, 4}, {6, 6}, {8, 8}, {3, 8}, {16, 2}, {4, 16}}) {
      out.push_back({shape, rotated_of(keys, values), ResidualCode::resident});
    }
    for (const KvFormat& format :
         {KvFormat{8, 8, KvCode::plane}, KvFormat{6, 9, KvCode::plane}, KvFormat{16, 7, KvCode::plane},
          KvFormat{8, 8, KvCode::fp8}, KvFormat{8, 8, KvCode::int8}, KvFormat{4, 4, KvCode::nuq, false, 10},
          KvFormat{3, 2, KvCode::nuq, false, 30}, KvFormat{2, 16, KvCode::nuq, false, 0},
          KvFormat{16, 3, KvCode::nuq, false, 10}}) {
      out.push_back({shape, format, ResidualCode::resident});
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
      ASSERT_EQ(pages.mismatches(), 0u);
    }
  }
}

TEST(Residuals, OrdinaryValuesTakeFewBits) {
  Random random(72);
  const KvShape shape{.layers = 1, .kv_heads = 2, .head_dim = 64};
  struct Target {
    KvFormat format;
    ResidualCode code;
    double most;
  };
  const Target targets[] = {{format_of(8, 8), ResidualCode::resident, 5.3},
                            {format_of(6, 6), ResidualCode::resident, 7.3},
                            {format_of(4, 4), ResidualCode::resident, 9.4},
                            {format_of(2, 2), ResidualCode::resident, 11.5},
                            {{8, 8, KvCode::plane}, ResidualCode::resident, 4.2},
                            {{6, 6, KvCode::plane}, ResidualCode::resident, 6.2},
                            {{8, 8, KvCode::fp8}, ResidualCode::resident, 5.0},
                            {{8, 8, KvCode::int8}, ResidualCode::resident, 5.3},
                            {rotated_of(8, 8), ResidualCode::resident, 4.6},
                            {rotated_of(6, 6), ResidualCode::resident, 6.2},
                            {rotated_of(4, 4), ResidualCode::resident, 8.3},
                            {rotated_of(3, 3), ResidualCode::resident, 9.4},
                            {rotated_of(2, 2), ResidualCode::resident, 10.9},
                            {rotated_of(16, 4), ResidualCode::resident, 10.0},
                            {{4, 4, KvCode::nuq, false, 10}, ResidualCode::resident, 9.2},
                            {{2, 2, KvCode::nuq, false, 10}, ResidualCode::resident, 11.0},
                            {format_of(4, 4), ResidualCode::lossless, 11.5}};
  for (const Target& target : targets) {
    ResidualPages pages(shape, target.format, 4);
    pages.fill(Filling::normal, random);
    const double bits = bits_per_value(shape, 4, pages.encode(target.code).size());
    EXPECT_LE(bits, target.most) << target.format.key_bits << " bits";
    EXPECT_GT(bits, target.most - 2.5) << target.format.key_bits << " bits";
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
      const std::vector<bf16> back = pages.decode(c.code, hostile);
      ASSERT_FALSE(back.empty());
      ASSERT_EQ(pages.mismatches(), static_cast<uint32_t>(pages.pages_unlike(back)));
    }
    ASSERT_EQ(pages.decode(c.code, coded), pages.values());
  }
}

}  // namespace
}  // namespace vericache::test
