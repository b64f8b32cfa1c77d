// Scores by keys and by expected attention against float64; they do not depend on threads, paging or the border of past
// and tail.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/kv_fixture.h"
#include "backend/token_scores_reference.h"

namespace vericache::test {
namespace {

class TokenScores : public testing::TestWithParam<Isa> {
 protected:
  std::unique_ptr<Kernels> kernels(const KvShape& shape, int heads, int threads) {
    return make_cpu_kernels(GetParam(), threads,
                            {.shape = shape, .heads = heads, .max_rows = 64, .max_context_tokens = 10000});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, TokenScores, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

// The tokens in scattered pages; slots behind the last one are garbage.
struct Placed {
  Placed(const TokenData& data, int past_pages, Random& random)
      : pages(data.shape, {}, (data.tokens + kPageTokens - 1) / kPageTokens, random), past_pages(past_pages) {
    for (int head = 0; head < data.shape.kv_heads; ++head) {
      for (int token = 0; token < data.tokens; ++token) {
        pages.write(head, token, data.keys.data() + data.index(head, token, 0),
                    data.values.data() + data.index(head, token, 0));
      }
    }
    tokens.assign(static_cast<size_t>(data.shape.kv_heads), past_pages * kPageTokens);
  }
  LayerKv kv() const {
    KvView past = pages.view();
    past.tokens = tokens.data();
    KvView tail = pages.view(past_pages);
    tail.tokens = nullptr;
    return {past, tail, past_pages * kPageTokens};
  }
  Pages pages;
  int past_pages;
  std::vector<int> tokens;
};

TEST_P(TokenScores, KeysAloneTellTheirScores) {
  Random random(50);
  for (int round = 0; round < 16; ++round) {
    const KvShape shape{1, random.between(1, 3), 16 * random.between(1, 6)};
    const int tokens = round % 4 == 0 ? random.between(2000, 2600) : random.between(1, 400);
    const TokenData data = random_tokens(shape, tokens, random);
    const int pages = (tokens + kPageTokens - 1) / kPageTokens;
    for (const KeyMeasure measure : {KeyMeasure::smallness, KeyMeasure::difference}) {
      std::vector<float> first;
      for (const int threads : {1, 3}) {
        const Placed placed(data, random.below(pages), random);
        std::vector<float> scratch(key_score_floats(tokens, shape), NAN);
        std::vector<float> scores(static_cast<size_t>(shape.kv_heads * tokens) + 1, 42.0f);
        kernels(shape, shape.kv_heads, threads)
            ->key_scores({shape, placed.kv(), tokens, measure, scratch.data(), scores.data()});
        ASSERT_EQ(scores.back(), 42.0f);
        if (threads == 1) {
          first = scores;
        }
        ASSERT_EQ(scores, first);
      }
      const std::vector<double> expected = expected_key_scores(data, measure);
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(first[i], expected[i], 1e-5 * std::abs(expected[i]) + 1e-6);
      }
    }
  }
}

TEST_P(TokenScores, ExpectedAttentionIsThatOfTheFormula) {
  Random random(51);
  for (int round = 0; round < 12; ++round) {
    const KvShape shape{1, random.between(1, 3), 16 * random.between(1, 4)};
    const int heads = shape.kv_heads * random.between(1, 3);
    const int tokens = random.between(round == 0 ? 1 : 40, round == 1 ? 1200 : 300);
    const TokenData data = random_tokens(shape, tokens, random);
    const int rows = std::min(tokens, random.between(1, 70));
    const QueryData queries = random_queries(shape, heads, rows, tokens - 1 + random.below(50), random);
    const int from = queries.position + rows;
    const int future = random.between(1, 90);
    const int positions = from + random.between(0, 100);  // some of the future may be unknown
    const int sinks = random.below(6);
    const std::vector<float> cos = queries.table(positions, [](double x) { return std::cos(x); });
    const std::vector<float> sin = queries.table(positions, [](double x) { return std::sin(x); });
    std::vector<float> first;
    for (const int threads : {1, 3}) {
      const Placed placed(data, random.below((tokens + kPageTokens - 1) / kPageTokens), random);
      std::vector<bf16> scratch(expected_bytes(rows, tokens, shape) / 2 + 32, bf16{0x7fc0});
      auto* block = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
      std::vector<bf16> q = queries.q;
      std::vector<float> scores(static_cast<size_t>(shape.kv_heads * tokens) + 1, 42.0f);
      kernels(shape, heads, threads)
          ->expected_attention({.shape = shape,
                                .heads = heads,
                                .scale = static_cast<float>(queries.scale),
                                .queries = {q.data(), nullptr, queries.capacity, queries.origin},
                                .rows = rows,
                                .position = queries.position,
                                .rope = {cos.data(), sin.data(), positions},
                                .from = from,
                                .future = future,
                                .kv = placed.kv(),
                                .tokens = tokens,
                                .sinks = sinks,
                                .scratch = block,
                                .scores = scores.data()});
      ASSERT_EQ(scores.back(), 42.0f);
      if (threads == 1) {
        first = scores;
      }
      ASSERT_EQ(scores, first);
    }
    const std::vector<double> expected = expected_attention_scores(data, queries, from, future, positions, sinks);
    for (size_t i = 0; i < expected.size(); ++i) {
      if (std::isinf(expected[i])) {
        ASSERT_EQ(first[i], INFINITY);
      } else {
        ASSERT_NEAR(first[i], expected[i], 0.02 * expected[i]) << "round " << round << ", " << i << " of " << tokens;
      }
    }
  }
}

// Mass is added to what other queries left, in rows of any length, and rows of one pass are a ring of their own.
TEST_P(TokenScores, MassOfPiecesIsTheMassOfAll) {
  Random random(52);
  const KvShape shape{1, 2, 32};
  const int heads = 4;
  const int tokens = 300;
  const TokenData data = random_tokens(shape, tokens, random);
  const Placed placed(data, 2, random);
  std::vector<bf16> q = random.bf16s(static_cast<size_t>(tokens * heads * shape.key_dim()));
  std::vector<float> log_sum_exp(static_cast<size_t>(tokens * heads), 3.0f);
  const auto k = kernels(shape, heads, 2);
  const auto run = [&](int first, int end, int stride, int added, std::vector<float>& mass) {
    const size_t row = static_cast<size_t>(first * heads);
    k->attention_mass({.shape = shape,
                       .heads = heads,
                       .scale = 0.2f,
                       .queries = {q.data() + row * 32, log_sum_exp.data() + row, end - first, first},
                       .rows = end - first,
                       .position = first,
                       .kv = placed.kv(),
                       .tokens = end,
                       .mass = mass.data(),
                       .stride = stride,
                       .added = added});
  };
  std::vector<float> whole(static_cast<size_t>(2 * tokens), NAN);
  run(0, tokens, tokens, 0, whole);
  const int stride = 400;
  std::vector<float> pieces(static_cast<size_t>(2 * stride), NAN);
  int done = 0;
  for (const int end : {1, 63, 64, 66, 190, tokens}) {
    run(done, end, stride, done, pieces);
    done = end;
  }
  for (int head = 0; head < 2; ++head) {
    for (int token = 0; token < stride; ++token) {
      const float have = pieces[static_cast<size_t>(head * stride + token)];
      if (token < tokens) {
        const float want = whole[static_cast<size_t>(head * tokens + token)];
        ASSERT_NEAR(have, want, 1e-5f * want + 1e-7f);
      } else {
        ASSERT_TRUE(std::isnan(have));
      }
    }
  }
}

// The largest weight of any row and query head, against float64; its bits do not depend on how rows were cut.
TEST_P(TokenScores, TheLargestWeightIsThatOfTheFormula) {
  Random random(53);
  for (int round = 0; round < 8; ++round) {
    const KvShape shape{1, random.between(1, 3), 16 * random.between(1, 4)};
    const int group = random.between(1, 5);
    const int heads = shape.kv_heads * group;
    const int tokens = random.between(1, 300);
    const int rows = random.between(1, 90);
    const int position = round % 2 == 0 ? tokens : std::max(0, tokens - rows / 2);  // some see less than all
    const TokenData data = random_tokens(shape, tokens, random);
    const Placed placed(data, random.below((tokens + kPageTokens - 1) / kPageTokens), random);
    const auto row_values = static_cast<size_t>(heads * shape.key_dim());
    std::vector<bf16> q(static_cast<size_t>(rows) * row_values, bf16{0});
    for (int i = 0; i < rows * heads; ++i) {
      for (int dim = 0; dim < shape.head_dim; ++dim) {
        q[static_cast<size_t>(i * shape.key_dim() + dim)] = to_bf16(random.normal());
      }
    }
    std::vector<float> log_sum_exp = random.floats(static_cast<size_t>(rows * heads));
    const int stride = tokens + random.below(9);
    const auto run = [&](int threads, const std::vector<int>& ends) {
      std::vector<float> largest(static_cast<size_t>(shape.kv_heads * stride), NAN);
      const auto k = kernels(shape, heads, threads);
      for (int first = 0; const int end : ends) {
        k->attention_mass(
            {.shape = shape,
             .heads = heads,
             .scale = 0.2f,
             .queries = {q.data() + static_cast<size_t>(first) * row_values,
                         log_sum_exp.data() + static_cast<size_t>(first * heads), end - first, position + first},
             .rows = end - first,
             .position = position + first,
             .kv = placed.kv(),
             .tokens = tokens,
             .mass = largest.data(),
             .stride = stride,
             .added = first == 0 ? 0 : tokens,
             .of = MassOf::largest});
        first = end;
      }
      return largest;
    };
    const std::vector<float> whole = run(1, {rows});
    const std::vector<float> pieces = run(3, {std::max(1, rows / 3), std::max(1, rows / 3) + rows / 2, rows});
    ASSERT_EQ(std::memcmp(whole.data(), pieces.data(), whole.size() * sizeof(float)), 0);
    for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      for (int token = 0; token < tokens; ++token) {
        double most = 0;
        for (int i = 0; i < rows * group; ++i) {
          const int at = i / group * heads + kv_head * group + i % group;
          double dot = 0;
          for (int dim = 0; dim < shape.head_dim; ++dim) {
            dot += static_cast<double>(to_float(q[static_cast<size_t>(at * shape.key_dim() + dim)])) *
                   data.key(kv_head, token, dim);
          }
          const bool sees = token <= position + i / group;
          most = std::max(most,
                          sees ? std::exp(0.2 * dot - static_cast<double>(log_sum_exp[static_cast<size_t>(at)])) : 0);
        }
        ASSERT_NEAR(whole[static_cast<size_t>(kv_head * stride + token)], most, 1e-3 * most + 1e-9);
      }
      for (int token = tokens; token < stride; ++token) {
        ASSERT_TRUE(std::isnan(whole[static_cast<size_t>(kv_head * stride + token)]));
      }
    }
  }
}

}  // namespace
}  // namespace vericache::test
