// Pages that a draft step chooses: how many, their bounds, which ones, and that attention reads these alone.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/page_choice_reference.h"

namespace vericache::test {
namespace {

KvFormat bounded(KvFormat format, double budget = 1, int dense_layers = 0) {
  format.choice = {.bounded = true, .budget = budget, .dense_layers = dense_layers};
  return format;
}
constexpr KvFormat kFormats[] = {
    {}, {4, 4}, {3, 8}, {16, 2}, {8, 8, KvCode::plane}, {8, 8, KvCode::int8}, {4, 4, KvCode::affine, true}};

TEST(PageChoice, SharesAndTokensBecomePages) {
  const auto pages = [](double budget, int held) {
    return PageChoice{.bounded = true, .budget = budget}.pages_of(held);
  };
  EXPECT_EQ(pages(0, 0), 0);
  EXPECT_EQ(pages(0, 7), 1);
  EXPECT_EQ(pages(0.1, 10), 1);
  EXPECT_EQ(pages(0.1, 11), 2);
  EXPECT_EQ(pages(0.1, 512), 52);
  EXPECT_EQ(pages(0.5, 1), 1);
  EXPECT_EQ(pages(1, 9), 9);
  EXPECT_EQ(pages(64, 9), 1);
  EXPECT_EQ(pages(65, 9), 2);
  EXPECT_EQ(pages(1024, 512), 16);
  EXPECT_EQ(pages(1024, 15), 15);
  EXPECT_EQ(pages(1 << 24, 3), 3);
  const PageChoice choice{.bounded = true, .budget = 0.5, .dense_layers = 2};
  EXPECT_FALSE(choice.in_layer(1));
  EXPECT_TRUE(choice.in_layer(2));
  EXPECT_FALSE(PageChoice{}.in_layer(5));
}

class ChosenPages : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(Cpu, ChosenPages, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

// Whatever is stored before them: bounds are those of the keys as they came.
TEST_P(ChosenPages, BoundsAreThoseOfAPlainLoop) {
  Random random(80);
  for (const int head_dim : {16, 32, 48, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    const auto kernels =
        make_cpu_kernels(GetParam(), 1, {.shape = shape, .heads = 1, .max_rows = 1, .max_context_tokens = 64});
    for (const KvFormat& plain : kFormats) {
      const KvFormat format = bounded(plain);
      for (const int tokens : {1, 17, 32, 33, 63, 64}) {
        Pages source(shape, {}, 1, random);
        std::vector<bf16> keys;
        for (int t = 0; t < tokens; ++t) {
          std::vector<bf16> key = random.bf16s(static_cast<size_t>(head_dim), 3.0f);
          key[1].bits = t % 2 == 0 ? 0x8000 : 0;  // zeros of either sign
          key[2].bits = t == tokens / 2 ? 0xff80 : key[2].bits;
          source.write(0, t, key.data(), random.bf16s(static_cast<size_t>(head_dim)).data());
          keys.insert(keys.end(), key.begin(), key.end());
        }
        std::vector<std::byte> with(head_page_bytes(format, shape) + 1, std::byte{0x5a});
        std::vector<std::byte> without(head_page_bytes(plain, shape));
        kernels->quantize_head_page(source.head_page(0, 0), tokens, shape, format, with.data());
        kernels->quantize_head_page(source.head_page(0, 0), tokens, shape, plain, without.data());
        ASSERT_EQ(with.back(), std::byte{0x5a});
        ASSERT_TRUE(std::equal(without.begin(), without.end(), with.begin()));
        ASSERT_EQ(without.size(), key_bounds_offset(format, shape));
        const std::vector<uint16_t> expected = page_bounds(keys, head_dim, shape.key_dim());
        ASSERT_EQ(std::memcmp(with.data() + without.size(), expected.data(), expected.size() * 2), 0)
            << head_dim << " dims, " << tokens << " tokens";
      }
    }
  }
}

struct Case {
  KvShape shape;
  int group = 1;
  KvFormat format;
  std::vector<int> past_tokens;
  int threads = 1;
};

// One sequence in the middle of a draft step. Reads with the format's choice, and without it from a table that holds
// nothing but the pages which the plain loop chooses: the same bits.
class DraftStep {
 public:
  DraftStep(Isa isa, const Case& c, Random& random)
      : case_(c),
        heads_(c.group * c.shape.kv_heads),
        kernels_(make_cpu_kernels(isa, c.threads,
                                  {.shape = c.shape, .heads = heads_, .max_rows = 4, .max_context_tokens = 8192})),
        past_(c.shape, c.format, kMostPages, random),
        tail_(c.shape, {}, 2, random) {
    const int dim = c.shape.head_dim;
    past_.tokens() = c.past_tokens;
    Pages source(c.shape, {}, kMostPages, random, false);
    for (int head = 0; head < c.shape.kv_heads; ++head) {
      const int tokens = c.past_tokens[static_cast<size_t>(head)];
      keys_.push_back(small_integers(tokens, dim, 3, random));
      const std::vector<bf16> keys = as_bf16(keys_.back(), dim, dim);
      for (int t = 0; t < tokens; ++t) {
        source.write(head, t, keys.data() + t * dim, random.bf16s(static_cast<size_t>(dim)).data());
      }
      for (int page = 0; page * kPageTokens < tokens; ++page) {
        kernels_->quantize_head_page(source.head_page(head, page), std::min(kPageTokens, tokens - page * kPageTokens),
                                     c.shape, c.format, past_.head_page(head, page));
      }
      for (int t = 0; t < kTailTokens; ++t) {
        tail_.write(head, t, random.bf16s(static_cast<size_t>(dim)).data(),
                    random.bf16s(static_cast<size_t>(dim)).data());
      }
    }
    q_ = small_integers(heads_, dim, 2, random);
  }

  std::vector<bf16> read(const KvView& past, bool draft, int layer = 0) {
    const std::vector<bf16> q = as_bf16(q_, case_.shape.head_dim, case_.shape.key_dim());
    const int position = kMostPages * kPageTokens;
    const SequenceRows rows{0, 1, position + kTailTokens - 1, nullptr, {past, tail_.view(), position}};
    const std::vector<SequenceRows> layers(static_cast<size_t>(layer) + 1, rows);
    const PassRows pass{.rows = 1, .layers = layer + 1, .draft = draft, .sequences = layers};
    std::vector<bf16> out(static_cast<size_t>(padded_dim(heads_ * case_.shape.head_dim)));
    kernels_->stage(pass);
    kernels_->attention({case_.shape, heads_, 0.11f, q.data(), &pass, layer, out.data(), nullptr});
    return out;
  }
  KvView past() const { return past_.view(); }

  // As if the other pages were not there.
  std::vector<bf16> read_by_hand() {
    const int dim = case_.shape.head_dim;
    std::vector<std::byte*> table(static_cast<size_t>(case_.shape.kv_heads * kMostPages));
    std::vector<int> tokens;
    for (int head = 0; head < case_.shape.kv_heads; ++head) {
      const int held = case_.past_tokens[static_cast<size_t>(head)];
      const auto first = q_.begin() + static_cast<ptrdiff_t>(head * case_.group * dim);
      const std::vector<int> scores =
          page_scores(keys_[static_cast<size_t>(head)], {first, first + case_.group * dim}, dim);
      const int count = case_.format.choice.pages_of(static_cast<int>(scores.size()));
      tokens.push_back(0);
      int place = head * kMostPages;
      for (const int page : best_pages(scores, count)) {
        table[static_cast<size_t>(place++)] = past_.head_page(head, page);
        tokens.back() += std::min(kPageTokens, held - page * kPageTokens);
      }
    }
    KvView view = past_.view();
    view.format.choice = {};
    view.head_pages = table.data();
    view.tokens = tokens.data();
    return read(view, true);
  }

 private:
  static constexpr int kMostPages = 70;
  static constexpr int kTailTokens = 75;
  Case case_;
  int heads_;
  std::unique_ptr<Kernels> kernels_;
  Pages past_;
  Pages tail_;
  std::vector<std::vector<int>> keys_;  // per KV head (tokens, head_dim)
  std::vector<int> q_;                  // (heads, head_dim)
};

TEST_P(ChosenPages, AttentionReadsTheBestPagesAlone) {
  Random random(81);
  int turn = 0;
  for (const int head_dim : {32, 48, 64, 96, 128}) {
    for (const KvFormat& plain : kFormats) {
      for (const double budget : {0.0, 0.2, 0.7, 1.0, 200.0, 1e6}) {
        Case c{{1, random.between(1, 3), head_dim}, random.between(1, 5), {}, {}, 1};
        c.format = bounded(plain, budget);
        c.threads = 1 + turn++ % 3;
        for (int head = 0; head < c.shape.kv_heads; ++head) {
          c.past_tokens.push_back(random.below(5) == 0 ? 0 : random.between(1, 900));
        }
        DraftStep step(GetParam(), c, random);
        ASSERT_EQ(step.read(step.past(), true), step.read_by_hand()) << head_dim << " dims, budget " << budget;
      }
    }
  }
}

// More pages than a split holds, and more tasks than threads.
TEST_P(ChosenPages, LongContexts) {
  Random random(82);
  for (const KvFormat& plain : {KvFormat{}, KvFormat{4, 4}}) {
    const Case c{{1, 2, 64}, 4, bounded(plain, 0.5), {4480, 4100}, 3};
    DraftStep step(GetParam(), c, random);
    ASSERT_EQ(step.read(step.past(), true), step.read_by_hand());
  }
}

TEST_P(ChosenPages, FullPassesAndDenseLayersReadEverything) {
  Random random(83);
  for (const KvFormat& plain : {KvFormat{}, KvFormat{4, 4}}) {
    const Case c{{1, 2, 64}, 2, bounded(plain, 0.1, 1), {900, 640}, 2};
    DraftStep step(GetParam(), c, random);
    KvView all = step.past();
    all.format.choice = {};
    const std::vector<bf16> everything = step.read(all, true);
    EXPECT_EQ(step.read(step.past(), false), everything);
    EXPECT_EQ(step.read(step.past(), true, 0), everything);
    EXPECT_NE(step.read(step.past(), true, 1), everything);
    all.format.choice = {.bounded = true, .budget = 1};
    EXPECT_EQ(step.read(all, true, 1), everything);
  }
}

}  // namespace
}  // namespace vericache::test
