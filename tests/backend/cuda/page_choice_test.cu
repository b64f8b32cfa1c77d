// The pages that a draft step chooses on a GPU, exactly those of the plain loop, their bounds, and draft attention that
// reads these alone.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/cuda/packed_fixture.h"
#include "backend/cuda/thinned.h"
#include "backend/page_choice_reference.h"

namespace vericache::test {
namespace {

constexpr KvFormat kFormats[] = {
    {}, {4, 4}, {8, 2}, {3, 6}, {8, 8, KvCode::plane}, {8, 8, KvCode::int8}, {4, 4, KvCode::affine, true}};
constexpr int kTailTokens = 75;

KvFormat bounded(KvFormat format, double budget, int dense_layers = 0) {
  format.choice = {.bounded = true, .budget = budget, .dense_layers = dense_layers};
  return format;
}
int pages_of(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}
size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

TEST(CudaPageChoice, BoundsAreThoseOfAPlainLoop) {
  Random random(90);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    for (const KvFormat& plain : kFormats) {
      const KvFormat format = bounded(plain, 0.1);
      for (const int tokens : {1, 17, 32, 33, 63, 64}) {
        HostPage page(head_dim, &random);
        std::vector<bf16> keys;
        for (int t = 0; t < tokens; ++t) {
          for (int d = 0; d < head_dim; ++d) {
            page.key(t, d) = to_bf16(random.normal(3.0f));
            page.key(t, d).bits = d == 1 ? (t % 2 == 0 ? 0x8000 : 0) : page.key(t, d).bits;
            page.value(t, d) = to_bf16(random.normal());
            keys.push_back(page.key(t, d));
          }
        }
        const DeviceArray<std::byte> source(page.bytes());
        const size_t bytes = head_page_bytes(format, shape);
        const size_t offset = key_bounds_offset(format, shape);
        const DeviceArray<std::byte> with(bytes + 16);
        const DeviceArray<std::byte> without(offset);
        cuda::quantize_head_page(source.data(), tokens, shape, format, with.data(), nullptr);
        cuda::quantize_head_page(source.data(), tokens, shape, plain, without.data(), nullptr);
        finish();
        const std::vector<std::byte> stored = with.read();
        const std::vector<std::byte> codes = without.read();
        ASSERT_TRUE(std::equal(codes.begin(), codes.end(), stored.begin()));
        const std::vector<uint16_t> expected = page_bounds(keys, head_dim, head_dim);
        ASSERT_EQ(bytes, offset + expected.size() * 2);
        ASSERT_EQ(std::memcmp(stored.data() + offset, expected.data(), expected.size() * 2), 0)
            << head_dim << " dims, " << tokens << " tokens";
        for (size_t i = bytes; i < stored.size(); ++i) {
          ASSERT_EQ(stored[i], std::byte{0xff}) << "what lies behind the page is not touched";
        }
      }
    }
  }
}

// Sequences in a draft step: resident keys are small integers, every head has its own count.
class Step {
 public:
  Step(const KvShape& shape, const KvFormat& format, int group, const std::vector<std::vector<int>>& counts,
       Random& random)
      : shape_(shape), format_(format), heads_(group * shape.kv_heads), group_(group), counts_(counts) {
    const int dim = shape.head_dim;
    DeviceArray<std::byte> source(head_page_bytes({}, shape));
    for (const std::vector<int>& of_heads : counts_) {
      const int pages = std::max(1, pages_of(*std::max_element(of_heads.begin(), of_heads.end())));
      past_.push_back(std::make_unique<DevicePages>(shape, format, pages + random.below(3), random));
      past_.back()->hold(of_heads);
      tail_.push_back(std::make_unique<DevicePages>(shape, KvFormat{}, pages_of(kTailTokens), random));
      longest_ = std::max(longest_, pages * kPageTokens);
      for (int head = 0; head < shape.kv_heads; ++head) {
        const int tokens = of_heads[static_cast<size_t>(head)];
        keys_.push_back(small_integers(tokens, dim, 3, random));
        for (int first = 0; first < tokens; first += kPageTokens) {
          const int held = std::min(kPageTokens, tokens - first);
          source.write(page_of(first, held, random).bytes());
          cuda::quantize_head_page(source.data(), held, shape, format, past_.back()->place(head, first / kPageTokens),
                                   nullptr);
          finish();
        }
        for (int page = 0; page < pages_of(kTailTokens); ++page) {
          HostPage bytes(dim, &random);
          for (int t = 0; t < kPageTokens; ++t) {
            for (int d = 0; d < dim; ++d) {
              bytes.key(t, d) = to_bf16(random.normal());
              bytes.value(t, d) = to_bf16(random.normal());
            }
          }
          tail_.back()->write(head, page, bytes.bytes());
        }
      }
    }
    q_ = small_integers(static_cast<int>(counts_.size()) * heads_, dim, 2, random);
  }

  // Of each (sequence, KV head), by the plain loop.
  std::vector<std::vector<int>> wanted() const {
    std::vector<std::vector<int>> out;
    const int dim = shape_.head_dim;
    for (size_t i = 0; i < keys_.size(); ++i) {
      const auto q = q_.begin() + static_cast<ptrdiff_t>(i) * group_ * dim;
      const std::vector<int> scores = page_scores(keys_[i], {q, q + group_ * dim}, dim);
      out.push_back(best_pages(scores, format_.choice.pages_of(static_cast<int>(scores.size()))));
    }
    return out;
  }
  int tokens_of(size_t pair, const std::vector<int>& pages) const {
    int tokens = 0;
    for (const int page : pages) {
      tokens += std::min(kPageTokens, count(pair) - page * kPageTokens);
    }
    return tokens;
  }
  std::byte* place(size_t pair, int page) const {
    const size_t heads = static_cast<size_t>(shape_.kv_heads);
    return past_[pair / heads]->place(static_cast<int>(pair % heads), page);
  }

  std::vector<SequenceRows> rows() const {
    std::vector<SequenceRows> out;
    for (size_t i = 0; i < counts_.size(); ++i) {
      SequenceRows rows{.first_row = static_cast<int>(i), .rows = 1, .position = longest_ + kTailTokens - 1};
      rows.kv = {past_[i]->view(), tail_[i]->view(), longest_};
      rows.kv.tail.tokens = nullptr;
      out.push_back(rows);
    }
    return out;
  }

  // The rows of layer 0, in the format that says what is chosen.
  std::vector<bf16> read(const std::vector<SequenceRows>& rows, const KvFormat& format, int read_tokens,
                         int layer = 0) const {
    std::vector<SequenceRows> layers;
    for (int i = 0; i <= layer; ++i) {
      layers.insert(layers.end(), rows.begin(), rows.end());
    }
    const int count = static_cast<int>(rows.size());
    const DeviceArray<SequenceRows> staged(layers);
    const cuda::StagedPass pass{.rows = count, .count = count, .draft = true, .sequences = staged.data()};
    const DeviceArray<bf16> q(as_bf16(q_, shape_.head_dim, shape_.head_dim));
    const DeviceArray<bf16> out(at(count, heads_ * shape_.head_dim));
    const cuda::Limits limits{
        .shape = shape_, .heads = heads_, .max_rows = count, .max_sequences = count, .max_context_tokens = longest()};
    const DeviceArray<std::byte> scratch(cuda::draft_attention_scratch_bytes(limits));
    const DeviceArray<int> counts(std::vector<int>(cuda::draft_attention_counts(limits)));
    AttentionArgs args{.shape = shape_, .heads = heads_, .scale = 0.11f, .q = q.data(), .layer = layer};
    args.out = out.data();
    cuda::draft_attention(args, format, pass, format.choice.in_layer(layer) ? longest() : read_tokens, read_tokens,
                          reinterpret_cast<float*>(scratch.data()), counts.data(), nullptr);
    finish();
    return out.read();
  }
  int longest() const { return longest_ + pages_of(kTailTokens) * kPageTokens; }

  void check_choice() const {
    const std::vector<SequenceRows> sequences = rows();
    const size_t pairs = keys_.size();
    const int stride = pages_of(longest_) / 4 * 4 + 8;
    const DeviceArray<SequenceRows> staged(sequences);
    const DeviceArray<bf16> q(as_bf16(q_, shape_.head_dim, shape_.head_dim));
    const DeviceArray<float> scores(pairs * static_cast<size_t>(stride));
    const DeviceArray<std::byte*> pages(pairs * static_cast<size_t>(stride));
    const DeviceArray<int> tokens(pairs);
    cuda::choose_pages({.shape = shape_,
                        .heads = heads_,
                        .q = q.data(),
                        .sequences = staged.data(),
                        .count = static_cast<int>(sequences.size()),
                        .format = format_,
                        .scores = scores.data(),
                        .pages = pages.data(),
                        .tokens = tokens.data(),
                        .stride = stride},
                       nullptr);
    finish();
    const std::vector<std::byte*> got = pages.read();
    const std::vector<int> held = tokens.read();
    const std::vector<std::vector<int>> expected = wanted();
    for (size_t pair = 0; pair < pairs; ++pair) {
      ASSERT_EQ(held[pair], tokens_of(pair, expected[pair])) << "head " << pair << " of " << count(pair) << " tokens";
      for (size_t i = 0; i < expected[pair].size(); ++i) {
        ASSERT_EQ(got[pair * static_cast<size_t>(stride) + i], place(pair, expected[pair][i]))
            << "head " << pair << ", place " << i << " of " << expected[pair].size();
      }
    }
  }

  // Draft attention that chooses, and the same over tables of nothing but the pages that it should choose: the same
  // bits, since both walk the same pages in the same splits.
  void check_reading() const {
    const std::vector<SequenceRows> sequences = rows();
    const std::vector<std::vector<int>> expected = wanted();
    const int stride = pages_of(longest_);
    std::vector<std::byte*> table(expected.size() * static_cast<size_t>(stride));
    std::vector<int> held;
    for (size_t pair = 0; pair < expected.size(); ++pair) {
      for (size_t i = 0; i < expected[pair].size(); ++i) {
        table[pair * static_cast<size_t>(stride) + i] = place(pair, expected[pair][i]);
      }
      held.push_back(tokens_of(pair, expected[pair]));
    }
    const DeviceArray<std::byte*> tables(table);
    const DeviceArray<int> tokens(held);
    KvFormat plain = format_;
    plain.choice = {};
    std::vector<SequenceRows> by_hand = sequences;
    for (size_t i = 0; i < by_hand.size(); ++i) {
      KvView& past = by_hand[i].kv.past;
      past.format = plain;
      past.head_pages = tables.data() + i * static_cast<size_t>(shape_.kv_heads * stride);
      past.page_stride = stride;
      past.tokens = tokens.data() + i * static_cast<size_t>(shape_.kv_heads);
    }
    const int read_tokens =
        format_.choice.pages_of(pages_of(longest_)) * kPageTokens + pages_of(kTailTokens) * kPageTokens;
    const std::vector<bf16> got = read(sequences, format_, read_tokens);
    ASSERT_TRUE(got == read(by_hand, plain, read_tokens));
    ASSERT_TRUE(got == read(sequences, format_, read_tokens)) << "no order of arrival shows";
    // A layer that reads everything, and a budget that is everything.
    KvFormat dense = format_;
    dense.choice.dense_layers = 2;
    KvFormat all = format_;
    all.choice.budget = 1;
    const std::vector<bf16> everything = read(sequences, plain, longest());
    ASSERT_TRUE(read(sequences, dense, longest(), 1) == everything);
    ASSERT_TRUE(read(sequences, all, longest()) == everything);
  }

 private:
  int count(size_t pair) const {
    const size_t heads = static_cast<size_t>(shape_.kv_heads);
    return counts_[pair / heads][pair % heads];
  }
  HostPage page_of(int first, int held, Random& random) const {
    HostPage page(shape_.head_dim, &random);
    for (int t = 0; t < held; ++t) {
      for (int d = 0; d < shape_.head_dim; ++d) {
        page.key(t, d) = to_bf16(static_cast<float>(keys_.back()[at(first + t, shape_.head_dim, d)]));
        page.value(t, d) = to_bf16(random.normal());
      }
    }
    return page;
  }

  KvShape shape_;
  KvFormat format_;
  int heads_;
  int group_;
  std::vector<std::vector<int>> counts_;  // (sequences, kv_heads)
  std::vector<std::unique_ptr<DevicePages>> past_;
  std::vector<std::unique_ptr<DevicePages>> tail_;
  std::vector<std::vector<int>> keys_;  // per (sequence, KV head): (tokens, head_dim)
  std::vector<int> q_;                  // (sequences, heads, head_dim)
  int longest_ = 0;
};

std::vector<std::vector<int>> random_counts(int sequences, int kv_heads, int most, Random& random) {
  std::vector<std::vector<int>> counts(static_cast<size_t>(sequences), std::vector<int>(static_cast<size_t>(kv_heads)));
  for (std::vector<int>& of_heads : counts) {
    for (int& count : of_heads) {
      count = random.below(5) == 0 ? 0 : random.between(1, most);
    }
  }
  return counts;
}

TEST(CudaPageChoice, ChosenPagesAreThoseOfThePlainLoop) {
  Random random(91);
  const int groups[] = {1, 2, 4, 7, 8, 12};
  int turn = 0;
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const KvFormat& plain : kFormats) {
      for (const double budget : {0.0, 0.2, 0.7, 1.0, 200.0, 1e6}) {
        const KvShape shape{1, random.between(1, 3), head_dim};
        const auto counts = random_counts(random.between(1, 3), shape.kv_heads, 1100, random);
        const int group = groups[turn++ % 6];
        SCOPED_TRACE(testing::Message() << head_dim << " dims, budget " << budget << ", group " << group);
        if (left_out()) {
          continue;
        }
        const Step step(shape, bounded(plain, budget), group, counts, random);
        step.check_choice();
        step.check_reading();
        if (HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

// More pages than one round of a block's threads lists, with many ties.
TEST(CudaPageChoice, LongSequences) {
  Random random(92);
  const KvShape shape{1, 1, 32};
  const Step step(shape, bounded({2, 2}, 0.4), 1, {{1500 * kPageTokens - 9}}, random);
  step.check_choice();
  step.check_reading();
}

}  // namespace
}  // namespace vericache::test
