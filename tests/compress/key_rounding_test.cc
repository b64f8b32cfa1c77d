// KeyRounding looks at the first queries, of every layer, and no further; what it says reaches the pages.
#include "compress/key_rounding.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "compress/compress_harness.h"
#include "forwarding_kernels.h"

namespace vericache {
namespace {

constexpr KvShape kShape{.layers = 2, .kv_heads = 2, .head_dim = 48};
constexpr int kHeads = 6;
constexpr KvFormat kRotated{3, 3, KvCode::affine, true};

class Recorder final : public test::ForwardingKernels {
 public:
  using ForwardingKernels::ForwardingKernels;
  void fit_rounding(const RoundingArgs& args) override { fits.push_back(args); }
  std::vector<RoundingArgs> fits;
};

TEST(KeyRounding, IsForRotatedKeysOfFewBits) {
  EXPECT_EQ(KeyRounding::bytes(kRotated, kShape), 2 * 2 * 48 * 48 * sizeof(bf16));
  EXPECT_EQ(KeyRounding::bytes({4, 8, KvCode::affine, true}, kShape), KeyRounding::bytes(kRotated, kShape));
  EXPECT_EQ(KeyRounding::bytes({6, 2, KvCode::affine, true}, kShape), 0u);
  EXPECT_EQ(KeyRounding::bytes({16, 2, KvCode::affine, true}, kShape), 0u);
  EXPECT_EQ(KeyRounding::bytes({3, 3}, kShape), 0u);
  EXPECT_EQ(KeyRounding::bytes({}, kShape), 0u);
}

TEST(KeyRounding, LearnsFromTheFirstQueriesOfEveryLayer) {
  test::RandomLayer full(kShape, kHeads, 1);
  Recorder kernels(full.kernels());
  std::vector<bf16> memory(KeyRounding::bytes(kRotated, kShape) / sizeof(bf16));
  KeyRounding rounding(kShape, reinterpret_cast<std::byte*>(memory.data()));
  const QueryRing ring{nullptr, nullptr, 4096, 100};
  EXPECT_EQ(rounding.of(0), nullptr);
  rounding.learn(kernels, 0, kHeads, ring, 0);
  EXPECT_EQ(rounding.of(0), nullptr) << "a pass without rows tells nothing";
  rounding.learn(kernels, 0, kHeads, ring, 160);
  EXPECT_EQ(rounding.of(0), memory.data());
  EXPECT_EQ(rounding.of(1), nullptr);
  for (int pass = 0; pass < 20; ++pass) {
    rounding.learn(kernels, 0, kHeads, ring, 700);
  }
  rounding.learn(kernels, 1, kHeads, ring, 30);
  EXPECT_EQ(rounding.of(1), memory.data() + memory.size() / 2);
  ASSERT_EQ(kernels.fits.size(), 1u + 4 + 1) << "160 rows, four times 512, and no more";
  int known = 0;
  for (const RoundingArgs& fit : std::span(kernels.fits).first(5)) {
    EXPECT_EQ(fit.known, known);
    EXPECT_EQ(fit.position + fit.rows, 100 + (known == 0 ? 160 : 700)) << "the last rows of the pass";
    EXPECT_EQ(fit.matrix, memory.data());
    EXPECT_EQ(fit.heads, kHeads);
    known += fit.rows;
  }
  EXPECT_EQ(known, 160 + 4 * 512);
  EXPECT_EQ(kernels.fits.back().known, 0);
  EXPECT_EQ(kernels.fits.back().rows, 30);
}

// The head pages that a compressor leaves, with and without a matrix.
TEST(KeyRounding, ReachesThePagesOfEveryMethod) {
  constexpr KvShape kOne{.layers = 1, .kv_heads = 2, .head_dim = 48};
  test::RandomLayer full(kOne, kHeads, 2);
  std::vector<bf16> matrix(rounding_bytes(kOne) / sizeof(bf16), to_bf16(0.25f));
  for (const auto& [spec, changes] : {std::pair{"quarot:bits=3", true},
                                      {"quarot:k=4,v=2", true},
                                      {"quarot:k=6,v=2", false},
                                      {"kivi:bits=3", false},
                                      {"knorm:budget=128+quarot:bits=3", true},
                                      {"quest:budget=128+quarot:bits=2", true}}) {
    std::vector<std::byte> pages[2];
    for (const bool given : {false, true}) {
      const auto compressor = make_compressor(spec);
      std::vector<std::byte> scratch(compressor->scratch_bytes(test::kMostTokens, kOne) + 64);
      compressor->set_scratch(scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64);
      test::Resident resident(compressor->format(), kOne);
      Attended seen;
      seen.heads = kHeads;
      seen.rounding = given ? matrix.data() : nullptr;
      ASSERT_TRUE(compressor->compress(full.kernels(), full.layer(0), {0, 192}, seen, resident.layer)) << spec;
      const std::byte* page = resident.layer.head_page(1, 0);
      pages[given ? 1 : 0].assign(page, page + head_page_bytes(compressor->format(), kOne));
    }
    EXPECT_EQ(pages[0] != pages[1], changes) << spec;
  }
}

}  // namespace
}  // namespace vericache
