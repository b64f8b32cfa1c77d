// Which tokens stay, on cases that can be done by hand, and what they take of the pool.
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <set>

#include "compress/adakv.h"
#include "compress/compress_harness.h"

namespace vericache::test {
namespace {

constexpr KvShape kShape{.layers = 4, .kv_heads = 2, .head_dim = 48};  // keys are padded to 64
constexpr int kHeads = 4;
constexpr int kTokens = 192;

// A layer whose keys point along the first axis with length 1, but for a few; values have length 1.
class Plain {
 public:
  Plain() : full(kShape, kHeads, 3) {
    for (int head = 0; head < kShape.kv_heads; ++head) {
      for (int token = 0; token < kMostTokens; ++token) {
        point(head, token, 0, 1);
      }
    }
  }
  void point(int head, int token, int axis, float length) {
    float key[kShape.head_dim] = {};
    float value[kShape.head_dim] = {};
    key[axis] = length;
    value[0] = 1;
    full.write(head, token, key, value);
  }
  // What stays of kTokens, when all queries up to `end` were seen.
  std::vector<std::vector<int>> kept(const std::string& spec, int tokens = kTokens, int looks = 1) {
    const auto compressor = full.compressor(spec);
    Notes notes = full.lend_notes(*compressor);
    Resident resident(compressor->format(), kShape);
    for (int look = 0; look < looks; ++look) {
      if (compressor->reconstructs()) {
        Attended repeated = full.queries(8, tokens);
        repeated.notes = notes;
        compressor->reconstruct(full.kernels(), full.layer(64), tokens, repeated);
        notes.reconstructed = tokens;
      }
      Attended seen = full.queries(tokens, 0);
      seen.notes = notes;
      seen.rope = full.rope(2 * kMostTokens);
      if (compressor->observes()) {
        compressor->observe(full.kernels(), full.layer(64), seen);
      }
      seen.notes.observed = tokens;
      EXPECT_TRUE(compressor->compress(full.kernels(), full.layer(64), {0, tokens}, seen, resident.layer));
    }
    std::vector<std::vector<int>> out;
    for (int head = 0; head < kShape.kv_heads; ++head) {
      out.push_back(kept_of(resident.layer, head));
    }
    return out;
  }
  RandomLayer full;
};

std::vector<int> last_tokens(int count, int tokens = kTokens) {
  std::vector<int> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), tokens - count);
  return out;
}

bool contains(const std::vector<int>& kept, int token) {
  return std::binary_search(kept.begin(), kept.end(), token);
}

TEST(Droppers, KNormKeepsShortKeysAndOfEqualsTheLater) {
  Plain layer;
  layer.point(0, 5, 3, 0.5f);
  layer.point(0, 70, 3, -0.25f);
  layer.point(0, 191, 3, 2.0f);
  layer.point(1, 100, 0, 0);
  const auto kept = layer.kept("knorm:budget=66");
  std::vector<int> expected = last_tokens(65);
  expected.pop_back();  // the long key
  expected.insert(expected.begin(), {5, 70});
  EXPECT_EQ(kept[0], expected);
  expected = last_tokens(65);
  expected.insert(expected.begin(), 100);
  EXPECT_EQ(kept[1], expected);
}

TEST(Droppers, KeyDiffKeepsWhatPointsElsewhereWhateverItsLength) {
  Plain layer;
  layer.point(0, 5, 3, 0.5f);
  layer.point(0, 70, 7, 100.0f);
  layer.point(0, 71, 0, -3.0f);
  layer.point(0, 72, 0, 50.0f);  // long, but along the mean
  layer.point(1, 9, 0, 0);       // no direction: as far as what stands across
  const auto kept = layer.kept("keydiff:budget=64");
  for (const int token : {5, 70, 71}) {
    EXPECT_TRUE(contains(kept[0], token)) << token;
  }
  EXPECT_FALSE(contains(kept[0], 72));
  EXPECT_TRUE(contains(kept[1], 9));
}

// The last query alone decides, and all heads keep the same.
TEST(Droppers, TovaKeepsWhatTheLastQueryAttendsToInAllHeads) {
  const int count = 64;
  RandomLayer full(kShape, kHeads, 4);
  const auto tova = full.compressor("tova:budget=64");
  ASSERT_EQ(tova->query_window(), 1);
  const Attended seen = full.queries(9, kTokens - 9);
  Resident resident({}, kShape);
  ASSERT_TRUE(tova->compress(full.kernels(), full.layer(64), {0, kTokens}, seen, resident.layer));
  std::vector<double> worth(kTokens);
  for (int token = 0; token < kTokens; ++token) {
    for (int head = 0; head < kHeads; ++head) {
      worth[static_cast<size_t>(token)] += full.weight(8, head, token, kTokens - 9);
    }
  }
  const std::vector<int> kept = kept_of(resident.layer, 0);
  ASSERT_EQ(static_cast<int>(kept.size()), count);
  EXPECT_EQ(kept_of(resident.layer, 1), kept);
  std::vector<double> sorted = worth;
  std::sort(sorted.rbegin(), sorted.rend());
  for (const int token : kept) {
    EXPECT_GE(worth[static_cast<size_t>(token)], sorted[count - 1] * (1 - 2e-3));
  }
}

// Sums over all queries, whatever pieces they came in; half of the budget is recent.
TEST(Droppers, H2oSumsOverAllQueries) {
  RandomLayer full(kShape, kHeads, 5);
  const auto h2o = full.compressor("h2o:budget=70");
  Notes notes = full.lend_notes(*h2o);
  const Attended all = full.queries(kTokens, 0);
  for (const int end : {1, 65, 66, 150, kTokens}) {
    Attended piece = all.last(kTokens - notes.observed);
    piece.rows = end - notes.observed;
    piece.notes = notes;
    h2o->observe(full.kernels(), full.layer(notes.observed / 64 * 64), piece);
    notes.observed = end;
  }
  Attended seen = all.last(3);
  seen.notes = notes;
  Resident resident({}, kShape);
  ASSERT_TRUE(h2o->compress(full.kernels(), full.layer(64), {0, kTokens}, seen, resident.layer));
  for (int kv_head = 0; kv_head < kShape.kv_heads; ++kv_head) {
    std::vector<double> mass(kTokens);
    for (int token = 0; token < kTokens; ++token) {
      for (int row = 0; row < kTokens; ++row) {
        for (const int head : {2 * kv_head, 2 * kv_head + 1}) {
          mass[static_cast<size_t>(token)] += full.weight(row, head, token, 0);
        }
      }
      EXPECT_NEAR(reinterpret_cast<const float*>(notes.device)[kv_head * kMostTokens + token],
                  mass[static_cast<size_t>(token)], 0.01 * mass[static_cast<size_t>(token)]);
    }
    const std::vector<int> kept = kept_of(resident.layer, kv_head);
    ASSERT_EQ(kept.size(), 70u);
    EXPECT_EQ(std::vector<int>(kept.end() - 35, kept.end()), last_tokens(35));
    std::sort(mass.begin(), mass.end() - 35);
    const double least = mass[kTokens - 70];
    for (auto token = kept.begin(); token != kept.end() - 35; ++token) {
      double own = 0;
      for (int row = 0; row < kTokens; ++row) {
        own += full.weight(row, 2 * kv_head, *token, 0) + full.weight(row, 2 * kv_head + 1, *token, 0);
      }
      EXPECT_GE(own, least * 0.98);
    }
  }
}

TEST(Droppers, ExpectedAttentionKeepsSinksAndWeighsValues) {
  Plain layer;
  // Equal keys: equal expectations; what differs is how long the values are.
  float key[kShape.head_dim] = {1};
  float value[kShape.head_dim] = {};
  value[7] = -3;
  for (const int token : {20, 90}) {
    layer.full.write(1, token, key, value);
  }
  const auto kept = layer.kept("expected:budget=64,window=16,sinks=3");
  EXPECT_EQ(std::vector<int>(kept[0].begin(), kept[0].begin() + 3), (std::vector<int>{0, 1, 2}));
  EXPECT_TRUE(contains(kept[1], 20) && contains(kept[1], 90));
  EXPECT_FALSE(contains(kept[0], 20));
}

// What stays of 256 tokens, of which the first kTokens were repeated in pieces; `largest` (kv_heads, kTokens): what
// they got at most.
std::vector<std::vector<int>> kept_of_repeated(const std::string& spec, std::vector<std::vector<double>>& largest) {
  RandomLayer full(kShape, kHeads, 6);
  const auto kvzip = full.compressor(spec);
  Notes notes = full.lend_notes(*kvzip);
  const Attended all = full.queries(40, kTokens);
  for (const auto& [first, end] : {std::pair{0, 1}, {1, 25}, {25, 40}}) {
    Attended piece = all;
    piece.position += first;
    piece.rows = end - first;
    piece.notes = notes;
    kvzip->reconstruct(full.kernels(), full.layer(128), kTokens, piece);
    notes.reconstructed = kTokens;
  }
  Attended seen;
  seen.notes = notes;
  Resident resident({}, kShape);
  EXPECT_TRUE(kvzip->compress(full.kernels(), full.layer(64), {0, 256}, seen, resident.layer));
  std::vector<std::vector<int>> kept;
  for (int kv_head = 0; kv_head < kShape.kv_heads; ++kv_head) {
    largest.emplace_back(kTokens);
    for (int token = 0; token < kTokens; ++token) {
      double& most = largest.back()[static_cast<size_t>(token)];
      for (int row = 0; row < 40; ++row) {
        for (const int head : {2 * kv_head, 2 * kv_head + 1}) {
          most = std::max(most, full.weight(row, head, token, kTokens));
        }
      }
      EXPECT_NEAR(reinterpret_cast<const float*>(notes.device)[kv_head * kMostTokens + token], most, 0.01 * most);
    }
    kept.push_back(kept_of(resident.layer, kv_head));
  }
  return kept;
}

// The largest weight of any repeated row and query head; tokens that came later fill half of the budget at most.
TEST(Droppers, KvZipTakesTheLargestWeight) {
  for (const auto& [budget, later] : {std::pair{70, 35}, {160, 64}}) {
    std::vector<std::vector<double>> largest;
    const auto kept = kept_of_repeated("kvzip:budget=" + std::to_string(budget), largest);
    for (size_t head = 0; head < kept.size(); ++head) {
      ASSERT_EQ(static_cast<int>(kept[head].size()), budget);
      const auto border = kept[head].end() - later;
      EXPECT_EQ(std::vector<int>(border, kept[head].end()), last_tokens(later, 256));
      std::vector<double> sorted = largest[head];
      std::sort(sorted.rbegin(), sorted.rend());
      for (auto token = kept[head].begin(); token < border; ++token) {
        ASSERT_LT(*token, kTokens);
        EXPECT_GE(largest[head][static_cast<size_t>(*token)],
                  sorted[static_cast<size_t>(budget - later - 1)] * (1 - 2e-3));
      }
    }
  }
}

// A context that had no room to be repeated: the last tokens stay.
TEST(Droppers, KvZipWithoutAReplayKeepsTheLast) {
  RandomLayer full(kShape, kHeads, 7);
  const auto kvzip = full.compressor("kvzip:budget=70");
  Attended seen;
  seen.notes = full.lend_notes(*kvzip);
  Resident resident({}, kShape);
  ASSERT_TRUE(kvzip->compress(full.kernels(), full.layer(64), {0, kTokens}, seen, resident.layer));
  for (int head = 0; head < kShape.kv_heads; ++head) {
    EXPECT_EQ(kept_of(resident.layer, head), last_tokens(70));
  }
}

const char* const kScorers[] = {"snapkv", "pyramidkv", "h2o", "tova", "knorm", "keydiff", "expected", "kvzip"};

TEST(Droppers, BudgetsOfNothingOfAPageAndBeyondTheContext) {
  Plain layer;
  for (const std::string scorer : kScorers) {
    for (const std::string& spec : {scorer + ":budget={}", "adakv(" + scorer + ":budget={})"}) {
      const auto with = [&](const char* budget) {
        std::string out = spec;
        return out.replace(out.find("{}"), 2, budget);
      };
      for (const char* least : {"0", "0.01", "2", "64"}) {
        const auto made = make_compressor(with(least));
        int mean = 0;
        for (int one = 0; one < kShape.layers; ++one) {
          mean += made->layer_tokens(kTokens, one, kShape);
        }
        EXPECT_NEAR(mean, 64 * kShape.layers * kShape.kv_heads, kShape.layers * kShape.kv_heads) << spec;
        for (const std::vector<int>& kept : layer.kept(with(least))) {
          EXPECT_TRUE(std::is_sorted(kept.begin(), kept.end()));
          EXPECT_EQ(std::set<int>(kept.begin(), kept.end()).size(), kept.size());
          EXPECT_GE(kept.size(), 1u);
          EXPECT_LE(static_cast<int>(kept.size()), 64 * AdaKv::kMostShare);
        }
      }
      for (const char* all : {"1", scorer == "pyramidkv" ? "4000" : "192", "100000"}) {
        for (const std::vector<int>& kept : layer.kept(with(all))) {
          EXPECT_EQ(kept, last_tokens(kTokens)) << spec;
        }
      }
      EXPECT_EQ(layer.kept(with("0.5"), 64)[1].size(), 64u) << spec;
    }
  }
}

// The more of its tokens are marked, the more a head keeps, from the second look on.
TEST(AdaKv, MemoryFollowsTheMarks) {
  Plain layer;
  for (int token = 0; token < kMostTokens; ++token) {
    layer.point(1, token, 1, token % 4 == 0 ? 0.5f : 2);  // three of four are worth less than any of head 0
  }
  const int tokens = kMostTokens;
  const auto ada = layer.full.compressor("adakv:alpha=0.75(knorm:budget=256)");
  Notes notes = layer.full.lend_notes(*ada);
  Resident resident({}, kShape);
  Attended seen;
  seen.notes = notes;
  ASSERT_TRUE(ada->compress(layer.full.kernels(), layer.full.layer(64), {0, tokens}, seen, resident.layer));
  EXPECT_EQ(resident.layer.tokens(0), 256);
  EXPECT_EQ(resident.layer.tokens(1), 256);
  EXPECT_EQ(resident.pool.pool.used(), 8);
  EXPECT_EQ(notes.report[0], 512 - 160);  // 160 short keys of head 1 come first, then head 0
  EXPECT_EQ(notes.report[1], 160);
  ASSERT_TRUE(ada->compress(layer.full.kernels(), layer.full.layer(64), {0, tokens}, seen, resident.layer));
  EXPECT_EQ(resident.layer.tokens(0), 64 + 264);  // a quarter evenly, 384 of 512 and 352 of 512 marks
  EXPECT_EQ(resident.layer.tokens(1), 64 + 120);
  EXPECT_EQ(resident.pool.pool.used(), 6 + 3);
  EXPECT_LE(resident.pool.pool.used(), ada->layer_pages(tokens, 0, kShape));
  // Each holds the shortest keys, of equals the later.
  EXPECT_EQ(kept_of(resident.layer, 0), last_tokens(328, tokens));
  std::vector<int> shortest;
  for (int token = 0; token < tokens; ++token) {
    if (token % 4 == 0 || token >= tokens - 32) {
      shortest.push_back(token);
    }
  }
  EXPECT_EQ(kept_of(resident.layer, 1), shortest);
  for (int head = 0; head < kShape.kv_heads; ++head) {
    const std::vector<int> kept = kept_of(resident.layer, head);
    for (size_t i = 0; i < kept.size(); ++i) {
      std::vector<std::byte> expected(head_page_bytes(KvFormat{}, kShape));
      std::vector<std::byte> actual(expected.size());
      copy_token(layer.full.head_page(head, kept[i] / kPageTokens), kept[i] % kPageTokens, expected.data(), 0, kShape);
      copy_token(resident.layer.head_page(head, static_cast<int>(i) / kPageTokens), static_cast<int>(i) % kPageTokens,
                 actual.data(), 0, kShape);
      ASSERT_EQ(expected, actual);
    }
  }
}

// Heads that take turns at being the larger one need no more pages than before.
TEST(AdaKv, WhatOneHeadGivesUpIsThereForTheOther) {
  Plain layer;
  const auto ada = layer.full.compressor("adakv:alpha=1(knorm:budget=128)");
  Notes notes = layer.full.lend_notes(*ada);
  Resident resident({}, kShape, kMostTokens / kPageTokens, ada->layer_pages(kMostTokens, 0, kShape));
  Attended seen;
  seen.notes = notes;
  for (int round = 0; round < 12; ++round) {
    notes.report[0] = round % 2 == 0 ? 250 : 6 * round;
    notes.report[1] = 256 - notes.report[0];
    const std::vector<int> marks(notes.report, notes.report + 2);
    ASSERT_TRUE(ada->compress(layer.full.kernels(), layer.full.layer(64), {0, kMostTokens}, seen, resident.layer));
    EXPECT_EQ(resident.layer.tokens(0), marks[0]);
    EXPECT_EQ(resident.layer.tokens(1), marks[1]);
  }
}

RC_GTEST_PROP(AdaKv, SharesAddUpAndStayInBounds, ()) {
  const auto heads = *rc::gen::inRange<size_t>(1, 40);
  const int mean = *rc::gen::inRange(0, 500);
  const int most = mean + *rc::gen::inRange(0, 3 * mean + 1);
  const double alpha = *rc::gen::inRange(0, 101) / 100.0;
  const auto marks = *rc::gen::container<std::vector<int>>(heads, rc::gen::inRange(0, 1000));
  std::vector<int> counts(heads, -1);
  share_budget(marks, alpha, mean, most, counts);
  RC_ASSERT(std::accumulate(counts.begin(), counts.end(), 0) == mean * static_cast<int>(heads));
  for (size_t head = 0; head < heads; ++head) {
    RC_ASSERT(counts[head] >= 0 && counts[head] <= most);
    RC_ASSERT(counts[head] >= std::min(most, static_cast<int>((1 - alpha) * mean)));
    for (size_t other = 0; other < heads; ++other) {
      RC_ASSERT(marks[head] <= marks[other] || counts[head] + 1 >= counts[other]);
    }
  }
}

// What a sequence takes of the pool, layer by layer: a pyramid's pages are those of its steps, and all together are no
// more than the same budget spread evenly would take but for rounding.
TEST(PyramidKv, LayersDifferInMemory) {
  RandomLayer full(kShape, kHeads, 6);
  const auto pyramid = full.compressor("pyramidkv:budget=256,window=8");
  const auto even = make_compressor("snapkv:budget=256,window=8");
  OwnedPool pages(head_page_bytes(KvFormat{}, kShape), 80);
  OwnedPool index(ResidentIndex::bytes(kShape, 10, kMostTokens, false), 1);
  ResidentKv resident(kShape, {}, pages.pool, {index.pool.take(), 10, kMostTokens, false});
  int expected = 0;
  for (int layer = 0; layer < kShape.layers; ++layer) {
    FullLayer here = full.layer(64);
    here.layer = layer;
    ASSERT_TRUE(pyramid->compress(full.kernels(), here, {0, kMostTokens}, full.queries(8, kMostTokens - 8),
                                  resident.layer(layer)));
    // 8 in the window; 484 at the bottom, 12 at the top.
    const int kept = std::array{492, 335, 177, 20}[static_cast<size_t>(layer)];
    EXPECT_EQ(resident.layer(layer).tokens(0), kept);
    EXPECT_EQ(resident.layer(layer).tokens(1), kept);
    expected += kShape.kv_heads * ((kept + 63) / 64);
  }
  EXPECT_EQ(pages.pool.used(), expected);
  EXPECT_EQ(pages.pool.used(), 2 * (8 + 6 + 3 + 1));
  EXPECT_EQ(resident.bytes(), pyramid->resident_bytes(kMostTokens, kShape));
  EXPECT_LE(pages.pool.used(), even->resident_pages(kMostTokens, kShape) + kShape.kv_heads * kShape.layers);
}

// Layers that keep everything name their tokens too, and extend from fold to fold.
TEST(PerLayer, LayersOfTheirOwn) {
  RandomLayer full(kShape, kHeads, 7);
  const auto mixed = full.compressor("knorm:budget=100;layers=1-2:none;layers=3:streaming-llm:sinks=2,window=3");
  EXPECT_TRUE(mixed->chooses_anew());
  EXPECT_EQ(mixed->kept_tokens(kTokens), kTokens);
  OwnedPool pages(head_page_bytes(KvFormat{}, kShape), 80);
  OwnedPool index(ResidentIndex::bytes(kShape, 10, kMostTokens, false), 1);
  ResidentKv resident(kShape, {}, pages.pool, {index.pool.take(), 10, kMostTokens, false});
  for (int layer = 0; layer < kShape.layers; ++layer) {
    FullLayer here = full.layer(64);
    here.layer = layer;
    for (const TokenRange fresh : {TokenRange{0, 64}, {64, 192}}) {
      if (fresh.end == kTokens || !mixed->chooses_anew_in(layer)) {
        ASSERT_TRUE(mixed->compress(full.kernels(), here, fresh, {}, resident.layer(layer)));
      }
    }
  }
  for (int head = 0; head < kShape.kv_heads; ++head) {
    EXPECT_EQ(resident.layer(0).tokens(head), 100);
    EXPECT_EQ(kept_of(resident.layer(1), head), last_tokens(kTokens));
    EXPECT_EQ(kept_of(resident.layer(2), head), last_tokens(kTokens));
    EXPECT_EQ(kept_of(resident.layer(3), head), (std::vector<int>{0, 1, 189, 190, 191}));
  }
  EXPECT_EQ(pages.pool.used(), 2 * (2 + 3 + 3 + 1));
  EXPECT_EQ(resident.bytes(), mixed->resident_bytes(kTokens, kShape));
}

}  // namespace
}  // namespace vericache::test
