// Non-uniform codes: outliers are the farthest values and come back as they were, codes name the nearest level, levels
// lie where the values do.
#include "backend/nuq_codes.h"

#include <gtest/gtest.h>

#include <cmath>

#include "backend/cpu/nuq_encoder.h"
#include "backend/packed_page.h"

namespace vericache::test {
namespace {

constexpr KvFormat nuq(int key_bits, int value_bits, int outliers) {
  return {key_bits, value_bits, KvCode::nuq, false, outliers};
}
constexpr KvFormat kFormats[] = {nuq(2, 2, 10), nuq(3, 3, 10), nuq(4, 4, 10),  nuq(4, 3, 30),
                                 nuq(2, 4, 1),  nuq(3, 2, 0),  nuq(16, 3, 10), nuq(4, 16, 20)};

class NuqCodes : public testing::TestWithParam<Isa> {
 protected:
  std::unique_ptr<Kernels> kernels(const KvShape& shape) {
    return make_cpu_kernels(GetParam(), 1,
                            {.shape = shape, .heads = shape.kv_heads, .max_rows = 1, .max_context_tokens = 64});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, NuqCodes, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

// K or V of a page, by dim and token.
struct Part {
  Part(const Page& page, bool keys)
      : page(page), keys(keys), layout(page.layout(keys)), reader(page.part(keys), layout) {}
  int index(int dim, int token) const { return static_cast<int>(index_of(layout, dim, token)); }
  bf16 original(int dim, int token) const { return page.original(keys, index(dim, token)); }
  bf16 read(int dim, int token) const { return page.read(keys, index(dim, token)); }
  uint32_t code(int dim, int token) const {
    return code_at(page.part(keys), layout, code_index(layout, index(dim, token)));
  }
  int group(int dim, int token) const { return keys ? dim : token; }
  bool apart(int dim, int token) const {
    uint32_t slot = 0;
    return reader.find(dim, token, slot);
  }
  double mean(int group, int tokens) const {
    double sum = 0;
    const int count = keys ? tokens : dims_of(layout);
    for (int i = 0; i < count; ++i) {
      sum += double{to_float(keys ? original(group, i) : original(i, group))};
    }
    return sum / count;
  }

  const Page& page;
  bool keys;
  PartLayout layout;
  NuqReader reader;
};

void expect_outliers(const Part& part, int tokens) {
  const int dims = dims_of(part.layout);
  int found = 0;
  double nearest = std::numeric_limits<double>::infinity();  // of the outliers
  double farthest = 0;                                       // of the others
  for (int d = 0; d < dims; ++d) {
    for (int t = 0; t < kPageTokens; ++t) {
      if (t >= tokens) {
        ASSERT_FALSE(part.apart(d, t));
        continue;
      }
      const double distance = std::abs(double{to_float(part.original(d, t))} - part.mean(part.group(d, t), tokens));
      if (part.apart(d, t)) {
        ++found;
        nearest = std::min(nearest, distance);
        ASSERT_EQ(part.read(d, t), part.original(d, t));
        ASSERT_EQ(part.code(d, t), nuq_middle_code(part.layout.part.bits));
      } else {
        farthest = std::max(farthest, distance);
      }
    }
  }
  ASSERT_EQ(found, std::min(outlier_slots(part.layout.part, dims), dims * tokens));
  ASSERT_GE(nearest * (1 + 1.0 / 128) + 1e-5, farthest) << "ranks have 8 significant bits";
}

void expect_codes(const Part& part, int tokens) {
  const int codes = 1 << part.layout.part.bits;
  for (int d = 0; d < dims_of(part.layout); ++d) {
    for (int t = 0; t < kPageTokens; ++t) {
      const uint32_t code = part.code(d, t);
      const int group = part.group(d, t);
      if (t >= tokens) {
        ASSERT_EQ(code, 0u);
        continue;
      }
      if (part.apart(d, t)) {
        continue;
      }
      const float scale = part.reader.scale(group);
      const auto level = static_cast<float>(part.reader.levels()[code]);
      ASSERT_EQ(part.read(d, t), to_bf16(std::fma(level, scale, part.reader.minimum(group))));
      if (scale == 0) {
        ASSERT_EQ(part.read(d, t), part.original(d, t)) << "a group of one value";
        continue;
      }
      const float position = (to_float(part.original(d, t)) - part.reader.minimum(group)) / scale;
      ASSERT_GE(position, 0);
      ASSERT_LE(position, kNuqSteps * 1.0001f);
      for (int other = 0; other < codes; ++other) {
        ASSERT_LE(std::abs(position - level),
                  std::abs(position - static_cast<float>(part.reader.levels()[other])) + 1e-3f);
      }
    }
  }
  for (int code = 1; code < codes; ++code) {
    ASSERT_GE(part.reader.levels()[code], part.reader.levels()[code - 1]);
  }
  ASSERT_LT(part.reader.levels()[codes - 1], kNuqPositions);
}

TEST_P(NuqCodes, NameTheNearestLevelBesideTheFarthestValues) {
  Random random(90);
  for (const int head_dim : {16, 48, 64, 128}) {
    const KvShape shape{1, 1, head_dim};
    const auto k = kernels(shape);
    for (const KvFormat& format : kFormats) {
      Page page(shape, format);
      for (const int tokens : {64, 17, 1}) {
        for (bf16& x : page.bytes) {
          x = to_bf16(random.normal(random.below(30) == 0 ? 8.0f : 1.0f) + 2.0f);
        }
        page.pack(*k, tokens);
        for (const bool keys : {true, false}) {
          if (!(keys ? format.key() : format.value()).exact()) {
            const Part part(page, keys);
            expect_outliers(part, tokens);
            expect_codes(part, tokens);
          }
        }
        ASSERT_FALSE(HasFatalFailure()) << head_dim << " dims, " << format.key_bits << " bits, " << tokens;
      }
    }
  }
}

// Where there are no more values than levels, levels are these values.
TEST_P(NuqCodes, LevelsLieWhereTheValuesDo) {
  Random random(91);
  const KvShape shape{1, 1, 64};
  const auto k = kernels(shape);
  constexpr int kPositions[] = {0, 45, 82, 127};
  for (const int bits : {2, 3, 4}) {
    Page page(shape, nuq(bits, bits, 0));
    for (const bool keys : {true, false}) {
      const PartLayout layout = page.layout(keys);
      for (int d = 0; d < 64; ++d) {
        for (int t = 0; t < kPageTokens; ++t) {  // every group has both ends of its range
          const int along = keys ? t : d;
          const int group = keys ? d : t;
          const int position = kPositions[along < 2 ? 3 * along : random.below(4)];
          page.bytes[page.first(keys) + index_of(layout, d, t)] =
              to_bf16(static_cast<float>(position * (1 + group % 2)));
        }
      }
    }
    page.pack(*k, kPageTokens);
    EXPECT_TRUE(page.back == page.bytes) << bits << " bits";
    if (bits == 2) {
      for (int code = 0; code < 4; ++code) {
        EXPECT_EQ(Part(page, true).reader.levels()[code], kPositions[code]);
        EXPECT_EQ(Part(page, false).reader.levels()[code], kPositions[code]);
      }
    }
  }
}

// What is not finite is kept, and is no draft's business.
TEST_P(NuqCodes, ValuesThatAreNotFiniteAreKeptAndNotRead) {
  Random random(92);
  const KvShape shape{1, 1, 64};
  const auto k = kernels(shape);
  Page page(shape, nuq(3, 3, 10));
  for (bf16& x : page.bytes) {
    x = to_bf16(random.normal());
  }
  constexpr uint16_t kStrange[] = {0x7f80, 0xff80, 0x7fc1};
  for (const bool keys : {true, false}) {
    for (int i = 0; i < 3; ++i) {
      page.bytes[page.first(keys) + index_of(page.layout(keys), 5 * i, 7 + i)] = bf16{kStrange[i]};
    }
  }
  page.pack(*k, kPageTokens);
  for (const bool keys : {true, false}) {
    const Part part(page, keys);
    for (int i = 0; i < 3; ++i) {
      uint32_t slot = 0;
      ASSERT_TRUE(part.reader.find(5 * i, 7 + i, slot));
      EXPECT_EQ(slot_value(slot), kStrange[i]);
    }
  }
  for (const bf16 x : page.back) {
    ASSERT_LT(std::abs(to_float(x)), 10.0f);
  }
}

TEST(NuqPages, AreAsLargeAsTheirBitsAndSlots) {
  const KvShape shape{1, 1, 64};
  // Codes, scales and minima, levels, 41 slots made 44 so that they fill units of 16 bytes.
  EXPECT_EQ(key_page_bytes(KvPart(3, KvCode::nuq, 10), shape), 64 * 64 * 3 / 8 + 4 * 64 + 16 + 4 * 44u);
  EXPECT_EQ(value_page_bytes(KvPart(4, KvCode::nuq, 0), shape), 64 * 64 * 4 / 8 + 4 * 64 + 16u);
  EXPECT_EQ(head_page_bytes(nuq(16, 2, 30), {1, 1, 128}), 128 * 64 * 2u + 128 * 64 * 2 / 8 + 4 * 64 + 16 + 4 * 248u);
}

// Vector classes agree bit for bit: drafts on one machine are drafts on another.
TEST(NuqCodesClasses, AgreeBitForBit) {
  Random random(93);
  expect_classes_agree(kFormats, random);
}

}  // namespace
}  // namespace vericache::test
