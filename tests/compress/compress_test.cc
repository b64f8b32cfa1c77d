#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <set>

#include "base/hash.h"
#include "compress/compress_harness.h"
#include "compress/scoring.h"
#include "kv/wire.h"

namespace vericache {
namespace {

using test::kept_of;
using test::kMostTokens;
using test::OwnedPool;
using test::RandomLayer;

constexpr KvShape kShape{.layers = 1, .kv_heads = 2, .head_dim = 48};  // keys are padded to 64
constexpr int kHeads = 6;

// Of the shape that these tests share.
struct Resident : test::Resident {
  explicit Resident(const KvFormat& format) : test::Resident(format, kShape) {}
  using test::Resident::Resident;
};

std::vector<bf16> decoded(Kernels& kernels, const ResidentLayer& layer, int head, int page) {
  std::vector<bf16> out(head_page_bytes(KvFormat{}, layer.shape()) / sizeof(bf16));
  kernels.dequantize_head_page(layer.head_page(head, page), layer.shape(), layer.format(),
                               reinterpret_cast<std::byte*>(out.data()));
  return out;
}

float key_of(const std::vector<bf16>& page, int token, int d) {
  return to_float(page[key_index(token, d, kShape)]);
}
float value_of(const std::vector<bf16>& page, int token, int d) {
  return to_float(page[static_cast<size_t>(kPageTokens * kShape.key_dim()) + value_index(token, d)]);
}

std::vector<bf16> copy_of(const std::byte* page) {
  std::vector<bf16> out(head_page_bytes(KvFormat{}, kShape) / sizeof(bf16));
  std::memcpy(out.data(), page, out.size() * sizeof(bf16));
  return out;
}

TEST(PagedCompressor, NoneKeepsEveryBit) {
  RandomLayer full(kShape, kHeads, 1);
  Resident resident(KvFormat{});
  const auto none = make_compressor("none");
  int end = 0;
  for (const int next : {64, 64, 320, 640}) {
    ASSERT_TRUE(none->compress(full.kernels(), full.layer(end), {end, next}, {}, resident.layer));
    end = next;
    for (int head = 0; head < kShape.kv_heads; ++head) {
      ASSERT_EQ(resident.layer.tokens(head), end);
      for (int page = 0; page < end / kPageTokens; ++page) {
        ASSERT_EQ(std::memcmp(resident.layer.head_page(head, page), full.head_page(head, page),
                              head_page_bytes(KvFormat{}, kShape)),
                  0);
      }
    }
  }
  EXPECT_EQ(none->wire_bytes(640, kShape), 0u);
}

// Group g of a page: keys of one channel, values of one token.
template <typename At>
void expect_within_half_a_step(int bits, int count, const At& original, const At& restored) {
  float low = original(0);
  float high = original(0);
  for (int i = 1; i < count; ++i) {
    low = std::min(low, original(i));
    high = std::max(high, original(i));
  }
  const float step = (high - low) / static_cast<float>((1 << bits) - 1);
  const float rounding = std::max(std::abs(low), std::abs(high)) / 128;  // the scale and the result are bf16
  for (int i = 0; i < count; ++i) {
    ASSERT_LE(std::abs(original(i) - restored(i)), 0.5f * step * 1.01f + rounding);
  }
}

TEST(PagedCompressor, KiviStaysWithinHalfAStep) {
  RandomLayer full(kShape, kHeads, 2);
  for (const auto& [spec, key_bits, value_bits] : {std::tuple{"kivi:bits=2", 2, 2},
                                                   {"kivi:bits=4", 4, 4},
                                                   {"kivi:bits=8", 8, 8},
                                                   {"kivi:bits=3", 3, 3},
                                                   {"kivi:k=6,v=3", 6, 3},
                                                   {"kivi:k=8,v=2", 8, 2},
                                                   {"kivi:k=16,v=4", 16, 4}}) {
    const auto kivi = make_compressor(spec);
    Resident resident(kivi->format());
    ASSERT_TRUE(kivi->compress(full.kernels(), full.layer(0), {0, 192}, {}, resident.layer));
    const uint64_t first = hash_bytes(resident.layer.head_page(1, 0), head_page_bytes(kivi->format(), kShape));
    ASSERT_TRUE(kivi->compress(full.kernels(), full.layer(128), {192, 640}, {}, resident.layer));
    EXPECT_EQ(hash_bytes(resident.layer.head_page(1, 0), head_page_bytes(kivi->format(), kShape)), first)
        << "it only extends";
    for (int head = 0; head < kShape.kv_heads; ++head) {
      ASSERT_EQ(resident.layer.tokens(head), 640);
      for (int page = 0; page < 10; ++page) {
        const std::vector<bf16> original = copy_of(full.head_page(head, page));
        const std::vector<bf16> restored = decoded(full.kernels(), resident.layer, head, page);
        for (int d = 0; d < kShape.head_dim; ++d) {
          const auto key = [&](const std::vector<bf16>& of) {
            return std::function<float(int)>([&, d](int t) { return key_of(of, t, d); });
          };
          expect_within_half_a_step(key_bits, kPageTokens, key(original), key(restored));
        }
        for (int t = 0; t < kPageTokens; ++t) {
          const auto value = [&](const std::vector<bf16>& of) {
            return std::function<float(int)>([&, t](int d) { return value_of(of, t, d); });
          };
          expect_within_half_a_step(value_bits, kShape.head_dim, value(original), value(restored));
        }
      }
    }
    EXPECT_LT(kivi->wire_bytes(640, kShape), 10 * page_bytes(kShape));
    EXPECT_EQ(kivi->wire_bytes(639, kShape), kivi->wire_bytes(576, kShape));
  }
}

// What a token of each format costs in device memory, all that its codes are read with included; and pages extend.
TEST(PagedCompressor, PagesOfEveryFormatAreAsLargeAsTheirBits) {
  RandomLayer full(kShape, kHeads, 14);
  for (const auto& [spec, bits, by_token] : {std::tuple{"kivi:bits=3", 3, 0},
                                             {"kivi:bits=6", 6, 0},
                                             {"quarot:bits=3", 3, 0},
                                             {"plane:bits=6", 6, 1},
                                             {"plane:bits=7", 7, 1},
                                             {"plane", 8, 1},
                                             {"plane:bits=9", 9, 1},
                                             {"fp8", 8, 1},
                                             {"kvquant:bits=3,outliers=0", 3, 0},
                                             {"int8", 8, 2}}) {
    const auto method = make_compressor(spec);
    const int values = kPageTokens * (kShape.key_dim() + kShape.head_dim);
    const int levels = std::string_view(spec).starts_with("kvquant") ? 2 * kNuqLevels : 0;
    const int groups = by_token > 0 ? 2 * by_token * kPageTokens : 4 * (kShape.key_dim() + kPageTokens) + levels;
    EXPECT_EQ(method->resident_bytes(65, kShape),
              static_cast<size_t>(2 * kShape.layers * kShape.kv_heads * (values * bits / 8 + groups)))
        << spec;
    Resident resident(method->format());
    ASSERT_TRUE(method->compress(full.kernels(), full.layer(0), {0, 192}, {}, resident.layer));
    const std::vector<bf16> first = decoded(full.kernels(), resident.layer, 1, 2);
    ASSERT_TRUE(method->compress(full.kernels(), full.layer(128), {192, 320}, {}, resident.layer));
    EXPECT_EQ(first, decoded(full.kernels(), resident.layer, 1, 2)) << "it only extends";
    for (int page = 0; page < 5; ++page) {
      const std::vector<bf16> original = copy_of(full.head_page(1, page));
      const std::vector<bf16> restored = decoded(full.kernels(), resident.layer, 1, page);
      double error = 0;
      double square = 0;
      for (size_t i = 0; i < original.size(); ++i) {
        const double x = to_float(original[i]);
        error += std::pow(to_float(restored[i]) - x, 2);
        square += x * x;
      }
      EXPECT_LT(error, square * (bits == 3 ? 0.1 : bits == 6 ? 0.02 : 0.005)) << spec;
      EXPECT_GT(error, 0) << spec;
    }
  }
}

// Quest stores as the format beneath it, with bounds behind every head page.
TEST(PagedCompressor, QuestKeepsEveryPageWithItsBounds) {
  RandomLayer full(kShape, kHeads, 15);
  for (const auto& [spec, beneath] : {std::pair{"quest:budget=0.1", "none"},
                                      {"quest:budget=512,dense=0+kivi:bits=4", "kivi:bits=4"},
                                      {"quest+quarot:bits=3", "quarot:bits=3"}}) {
    const auto quest = make_compressor(spec);
    const auto plain = make_compressor(beneath);
    EXPECT_EQ(quest->residual_code(), plain->residual_code());
    EXPECT_EQ(quest->wire_bytes(640, kShape), plain->wire_bytes(640, kShape));
    EXPECT_EQ(quest->resident_bytes(640, kShape),
              plain->resident_bytes(640, kShape) +
                  static_cast<size_t>(10 * kShape.layers * kShape.kv_heads) * key_bounds_bytes(kShape));
    Resident resident(quest->format());
    Resident expected(plain->format());
    ASSERT_TRUE(quest->compress(full.kernels(), full.layer(0), {0, 192}, {}, resident.layer));
    ASSERT_TRUE(quest->compress(full.kernels(), full.layer(128), {192, 320}, {}, resident.layer));
    ASSERT_TRUE(plain->compress(full.kernels(), full.layer(0), {0, 320}, {}, expected.layer));
    const size_t bytes = head_page_bytes(plain->format(), kShape);
    for (int head = 0; head < kShape.kv_heads; ++head) {
      for (int page = 0; page < 5; ++page) {
        const std::byte* stored = resident.layer.head_page(head, page);
        ASSERT_EQ(std::memcmp(stored, expected.layer.head_page(head, page), bytes), 0) << spec;
        std::vector<std::byte> whole(head_page_bytes(quest->format(), kShape));
        full.kernels().quantize_head_page(full.head_page(head, page), kPageTokens, kShape, quest->format(),
                                          whole.data());
        ASSERT_EQ(std::memcmp(stored, whole.data(), whole.size()), 0) << spec;
      }
    }
  }
}

// Scores that a test gives.
class GivenScores final : public ScoringCompressor {
 public:
  GivenScores(const Budget& budget, const KvFormat& format) : ScoringCompressor(format), budget_(budget) {}
  std::string name() const override { return "given" + format_suffix(); }
  int kept_tokens(int tokens) const override { return budget_.tokens_of(tokens); }
  std::vector<float> given;  // (kv_heads, tokens)

 private:
  void score(Kernels&, const FullLayer&, int tokens, const Attended&, float* scores) override {
    ASSERT_EQ(given.size(), static_cast<size_t>(kShape.kv_heads * tokens));
    std::copy(given.begin(), given.end(), scores);
  }
  Budget budget_;
};

// The rule in its plainest form: higher first, of equals the later; NaN is worth nothing.
std::vector<int> best_by_hand(const float* scores, int tokens, int count) {
  std::vector<int> order(static_cast<size_t>(tokens));
  for (int i = 0; i < tokens; ++i) {
    order[static_cast<size_t>(i)] = tokens - 1 - i;
  }
  const auto worth = [&](int t) { return std::isnan(scores[t]) ? -INFINITY : scores[t]; };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return worth(a) > worth(b); });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

void expect_kept_bits(const RandomLayer& full, const ResidentLayer& layer, int head) {
  const std::vector<int> positions = kept_of(layer, head);
  for (size_t i = 0; i < positions.size(); ++i) {
    std::vector<std::byte> expected(head_page_bytes(KvFormat{}, kShape));
    std::vector<std::byte> actual(expected.size());
    copy_token(full.head_page(head, positions[i] / kPageTokens), positions[i] % kPageTokens, expected.data(), 0,
               kShape);
    copy_token(layer.head_page(head, static_cast<int>(i) / kPageTokens), static_cast<int>(i) % kPageTokens,
               actual.data(), 0, kShape);
    ASSERT_EQ(expected, actual);
  }
}

TEST(ScoringCompressor, KeepsExactlyTheBestOfEveryHead) {
  RandomLayer full(kShape, kHeads, 3);
  std::mt19937_64 random(4);
  for (const bool quantized : {false, true}) {
    const KvFormat format = quantized ? KvFormat{4, 4} : KvFormat{};
    Resident resident(format);
    for (int round = 0; round < 60; ++round) {
      // Counts shrink and grow from call to call.
      const int tokens = kPageTokens * static_cast<int>(1 + random() % (kMostTokens / kPageTokens));
      const Budget budget{.amount = random() % 2 == 0 ? static_cast<double>(random() % 101) / 100
                                                      : static_cast<double>(2 + random() % 700),
                          .least = static_cast<int>(random() % 100)};
      GivenScores compressor(budget, format);
      for (int i = 0; i < kShape.kv_heads * tokens; ++i) {
        const auto draw = random() % 40;  // few values: ties everywhere
        compressor.given.push_back(draw == 0   ? INFINITY
                                   : draw == 1 ? NAN
                                   : draw == 2 ? -INFINITY
                                               : static_cast<float>(draw / 4));
      }
      full.lend_scratch(compressor);
      ASSERT_TRUE(compressor.compress(full.kernels(), full.layer(tokens / 128 * 64), {0, tokens}, {}, resident.layer));
      const int count = budget.tokens_of(tokens);
      ASSERT_LE(static_cast<size_t>(resident.layer.pages()) * head_page_bytes(format, kShape),
                compressor.resident_bytes(tokens, kShape));
      for (int head = 0; head < kShape.kv_heads; ++head) {
        ASSERT_EQ(kept_of(resident.layer, head),
                  best_by_hand(compressor.given.data() + static_cast<ptrdiff_t>(head * tokens), tokens, count));
        ASSERT_EQ(resident.layer.tokens(head), count);
        if (!quantized) {
          expect_kept_bits(full, resident.layer, head);
        }
      }
    }
    resident.layer.clear();
    EXPECT_EQ(resident.pool.pool.used(), 0);
  }
}

TEST(ScoringCompressor, QuantizesWhatItKeeps) {
  RandomLayer full(kShape, kHeads, 8);
  GivenScores exact({.amount = 100, .least = 0}, {});
  GivenScores quantized({.amount = 100, .least = 0}, {8, 8});
  for (int i = 0; i < kShape.kv_heads * 640; ++i) {
    exact.given.push_back(static_cast<float>(full.random()() % 1000));
  }
  quantized.given = exact.given;
  Resident kept({});
  Resident codes({8, 8});
  full.lend_scratch(exact);
  ASSERT_TRUE(exact.compress(full.kernels(), full.layer(320), {0, 640}, {}, kept.layer));
  full.lend_scratch(quantized);
  ASSERT_TRUE(quantized.compress(full.kernels(), full.layer(320), {0, 640}, {}, codes.layer));
  for (int head = 0; head < kShape.kv_heads; ++head) {
    for (int i = 0; i < 100; ++i) {
      const std::vector<bf16> want = copy_of(kept.layer.head_page(head, i / kPageTokens));
      const std::vector<bf16> have = decoded(full.kernels(), codes.layer, head, i / kPageTokens);
      for (int d = 0; d < kShape.head_dim; ++d) {
        ASSERT_NEAR(key_of(want, i % kPageTokens, d), key_of(have, i % kPageTokens, d), 0.05f);
        ASSERT_NEAR(value_of(want, i % kPageTokens, d), value_of(have, i % kPageTokens, d), 0.05f);
      }
    }
  }
}

TEST(ScoringCompressor, AnEmptyPoolIsSaid) {
  RandomLayer full(kShape, kHeads, 5);
  Resident small({}, kShape, 10, 3);
  EXPECT_FALSE(
      make_compressor("streaming-llm:window=128")->compress(full.kernels(), full.layer(0), {0, 640}, {}, small.layer));
  EXPECT_FALSE(make_compressor("none")->compress(full.kernels(), full.layer(0), {0, 640}, {}, small.layer));
  small.layer.clear();
  EXPECT_EQ(small.pool.pool.used(), 0);
}

TEST(StreamingLlm, KeepsSinksAndTheLast) {
  RandomLayer full(kShape, kHeads, 6);
  for (const auto& [spec, tokens, sinks, window] : {std::tuple{"streaming-llm:sinks=4,window=100", 640, 4, 100},
                                                    {"streaming-llm:sinks=0,window=65", 640, 0, 65},
                                                    {"streaming-llm:sinks=70,window=0", 640, 70, 0},
                                                    {"streaming-llm:sinks=4,window=0.25", 320, 4, 80},
                                                    {"streaming-llm:sinks=0,window=0", 128, 0, 0},
                                                    {"streaming-llm:sinks=4,window=1000", 192, 4, 188},
                                                    {"streaming-llm:sinks=500,window=9", 256, 500, 9}}) {
    Resident resident({});
    ASSERT_TRUE(make_compressor(spec)->compress(full.kernels(), full.layer(0), {0, tokens}, {}, resident.layer));
    for (int head = 0; head < kShape.kv_heads; ++head) {
      std::vector<int> expected;
      for (int token = 0; token < tokens; ++token) {
        if (token < sinks || token >= tokens - window) {
          expected.push_back(token);
        }
      }
      EXPECT_EQ(kept_of(resident.layer, head), expected) << spec;
      expect_kept_bits(full, resident.layer, head);
    }
  }
}

// SnapKV by its formula, in float64: the attention that the last queries pay to a token, summed over them and over the
// query heads of a KV head, then pooled over `kernel` neighbours.
std::vector<double> pooled_mass(const RandomLayer& full, const Attended& seen, int voters, int head, int tokens,
                                int kernel) {
  const int group = full.heads() / kShape.kv_heads;
  std::vector<double> mass(static_cast<size_t>(tokens));
  for (int token = 0; token < tokens; ++token) {
    for (int row = std::max(0, seen.rows - voters); row < seen.rows; ++row) {
      for (int h = head * group; h < (head + 1) * group; ++h) {
        mass[static_cast<size_t>(token)] += full.weight(row, h, token, seen.position);
      }
    }
  }
  std::vector<double> pooled(mass.size());
  for (int token = 0; token < tokens; ++token) {
    for (int i = std::max(0, token - kernel / 2); i <= std::min(tokens - 1, token + kernel / 2); ++i) {
      pooled[static_cast<size_t>(token)] += mass[static_cast<size_t>(i)] / kernel;
    }
  }
  return pooled;
}

void expect_snapkv_choice(RandomLayer& full, const Attended& seen, int past, int tokens, int window, int kernel,
                          int budget) {
  Resident resident({});
  const std::string spec = "snapkv:budget=" + std::to_string(budget) + ",window=" + std::to_string(window) +
                           ",kernel=" + std::to_string(kernel);
  const auto snapkv = full.compressor(spec);
  ASSERT_TRUE(snapkv->compress(full.kernels(), full.layer(past), {0, tokens}, seen, resident.layer));
  const int count = snapkv->kept_tokens(tokens);
  ASSERT_EQ(count, std::min(tokens, std::max({budget, window, kPageTokens})));
  for (int head = 0; head < kShape.kv_heads; ++head) {
    const std::vector<double> score = pooled_mass(full, seen, window, head, tokens, kernel);
    const std::vector<int> kept = kept_of(resident.layer, head);
    ASSERT_EQ(static_cast<int>(kept.size()), count);
    const std::set<int> chosen(kept.begin(), kept.end());
    double worst_kept = INFINITY;
    double best_dropped = 0;
    for (int token = 0; token < tokens; ++token) {
      if (token >= tokens - window) {
        ASSERT_TRUE(chosen.contains(token)) << "the last " << window << " stay";
      } else if (chosen.contains(token)) {
        worst_kept = std::min(worst_kept, score[static_cast<size_t>(token)]);
      } else {
        best_dropped = std::max(best_dropped, score[static_cast<size_t>(token)]);
      }
    }
    EXPECT_GE(worst_kept, best_dropped * (1 - 2e-3)) << spec << ", past " << past << ", tokens " << tokens;
  }
}

TEST(SnapKv, ChoosesByThePooledMassOfTheFormula) {
  RandomLayer full(kShape, kHeads, 7);
  std::mt19937_64 random(9);
  for (int round = 0; round < 25; ++round) {
    const int tokens = kPageTokens * static_cast<int>(2 + random() % 8);
    const int past = kPageTokens * static_cast<int>(random() % static_cast<uint64_t>(tokens / kPageTokens));
    const int window = 1 + static_cast<int>(random() % 40);
    // The last query stands at the end of what is folded or up to a page behind it; the first may precede the end of
    // `past`.
    const int last = tokens - 1 + static_cast<int>(random() % 60);
    const Attended seen = full.queries(window, last - window + 1);
    expect_snapkv_choice(full, seen, past, tokens, window, 1 + 2 * static_cast<int>(random() % 5),
                         65 + static_cast<int>(random() % 60));
  }
}

// Queries that precede the end of the stored pages see nothing behind themselves there either.
TEST(SnapKv, QueriesBeforeTheEndOfThePastAreCausal) {
  RandomLayer full(kShape, kHeads, 10);
  const Attended seen = full.queries(48, 153);  // 153..200, of which the last one votes, stored up to 256
  expect_snapkv_choice(full, seen, 256, 256, 1, 1, 70);
}

TEST(Compressor, ResidentBytesBoundWhatIsTaken) {
  RandomLayer full(kShape, kHeads, 11);
  std::mt19937_64 random(12);
  for (const char* spec : {"none",
                           "kivi:bits=2",
                           "kivi:k=8,v=4",
                           "streaming-llm:window=0.3",
                           "streaming-llm:sinks=3,window=70+kivi:bits=8",
                           "snapkv:budget=0.3",
                           "snapkv:budget=130,window=8+kivi:k=16,v=2",
                           "pyramidkv:budget=0.4",
                           "h2o:budget=0.2",
                           "tova:budget=100",
                           "knorm:budget=0.7",
                           "keydiff:budget=0+kivi:bits=2",
                           "expected:budget=0.3,window=8",
                           "adakv:alpha=0.9(snapkv:budget=0.3)",
                           "adakv(h2o:budget=90)+kivi:bits=4",
                           "kvzip:budget=0.3",
                           "adakv(kvzip:budget=0.2)+kivi:bits=4",
                           "none;layers=0:knorm:budget=0.5",
                           "quest:budget=0.1",
                           "quest:budget=0.1+kivi:bits=4"}) {
    const auto compressor = full.compressor(spec);
    Notes notes = full.lend_notes(*compressor);
    Resident resident(compressor->format());
    int end = 0;
    while (end < kMostTokens) {
      const int next = std::min(kMostTokens, end + kPageTokens * static_cast<int>(1 + random() % 3));
      Attended seen = full.queries(8, next - 8);
      seen.notes = notes;
      seen.rope = full.rope(2 * kMostTokens);
      if (compressor->observes()) {
        compressor->observe(full.kernels(), full.layer(end), seen);
      }
      seen.notes.observed = notes.observed = next;
      ASSERT_TRUE(compressor->compress(full.kernels(), full.layer(end), {end, next}, seen, resident.layer));
      end = next;
      const size_t taken = static_cast<size_t>(resident.layer.pages()) * head_page_bytes(compressor->format(), kShape);
      EXPECT_EQ(taken, resident.pool.pool.block_bytes() * static_cast<size_t>(resident.pool.pool.used()));
      EXPECT_LE(taken, compressor->resident_bytes(end, kShape)) << spec;
      // Admission reserves for the longest the sequence may become, at any number of tokens.
      EXPECT_LE(taken, compressor->resident_bytes(end + static_cast<int>(random() % 300), kShape)) << spec;
      int kept = 0;
      for (int head = 0; head < kShape.kv_heads; ++head) {
        kept += resident.layer.tokens(head);
        EXPECT_LE(resident.layer.tokens(head), compressor->kept_tokens(end)) << spec;
      }
      EXPECT_EQ(kept, compressor->layer_tokens(end, 0, kShape)) << spec;
      EXPECT_LE(resident.layer.pages(), compressor->layer_pages(end, 0, kShape)) << spec;
    }
  }
}

// What admission and staging count on is what the coder makes of ordinary values, nearly.
TEST(Compressor, WireBytesAreNearWhatTheWireCounts) {
  RandomLayer full(kShape, kHeads, 13);
  for (const char* spec :
       {"streaming-llm:window=0.3", "snapkv:budget=0.3+kivi:bits=4", "kivi:bits=4", "kivi:bits=8", "kivi:bits=2",
        "kivi:k=8,v=2", "knorm:budget=0.3", "adakv:alpha=1(keydiff:budget=0.3)",
        "kivi:bits=4;layers=0:snapkv+kivi:bits=4", "plane:bits=8", "int8", "fp8", "quarot:bits=4", "kivi:k=6,v=3",
        "kvquant:bits=4", "kvquant:bits=3", "kvquant:bits=2", "quest:budget=0.1+kivi:bits=4"}) {
    const auto compressor = full.compressor(spec);
    const int tokens = 640;
    const int pages = tokens / kPageTokens;
    const auto room = static_cast<size_t>(pages) * residual_bound(kShape);
    OwnedPool resident_pages(head_page_bytes(compressor->format(), kShape), pages * kShape.kv_heads);
    OwnedPool index(ResidentIndex::bytes(kShape, pages, tokens, false), 1);
    ResidentKv resident(kShape, compressor->format(), resident_pages.pool, {index.pool.take(), pages, tokens, false});
    const Notes notes = full.lend_notes(*compressor);
    Attended seen = full.queries(32, tokens - 32);
    seen.notes = notes;
    ASSERT_TRUE(compressor->compress(full.kernels(), full.layer(64), {0, tokens}, seen, resident.layer(0)));
    size_t bytes = 0;
    for (int page = 0; page < pages; ++page) {
      std::vector<std::byte> plain;
      for (int head = 0; head < kShape.kv_heads; ++head) {
        const std::byte* at = full.head_page(head, page);
        plain.insert(plain.end(), at, at + head_page_bytes(KvFormat{}, kShape));
      }
      const std::byte* source = plain.data();
      std::vector<std::byte> out(room);
      uint32_t units = 0;
      full.kernels().encode({.shape = kShape,
                             .code = compressor->residual_code(),
                             .pages = {&source, 1},
                             .resident = resident.layer(0).view(),
                             .first = page,
                             .sizes = nullptr,
                             .out = out.data(),
                             .ends = &units});
      bytes += units * kResidualUnit;
    }
    const auto expected = static_cast<double>(compressor->wire_bytes(tokens, kShape)) / kShape.layers;
    // The padding of narrow keys takes less; where a token's channels share what they are read with, it escapes.
    const bool shared = compressor->format().key().by_token();
    EXPECT_LE(static_cast<double>(bytes), (shared ? 3 : 1.06) * expected) << spec;
    EXPECT_GE(static_cast<double>(bytes), 0.75 * expected) << spec;
  }
}

}  // namespace
}  // namespace vericache
