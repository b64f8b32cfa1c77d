// Scores by keys and by expected attention on a GPU, against float64; they do not depend on where pages lie.
#include <gtest/gtest.h>

#include "backend/cuda/packed_fixture.h"
#include "backend/token_scores_reference.h"

namespace vericache::test {
namespace {

// The tokens in scattered pages, past and tail; slots behind the last one are garbage.
struct Placed {
  Placed(const TokenData& data, int past_pages, Random& random)
      : past_pages(past_pages),
        past(data.shape, {}, past_pages + 1, random),
        tail(data.shape, {}, (data.tokens + kPageTokens - 1) / kPageTokens - past_pages + 1, random) {
    for (int head = 0; head < data.shape.kv_heads; ++head) {
      for (int page = 0; page * kPageTokens < data.tokens; ++page) {
        HostPage host(data.shape.head_dim, &random);
        for (int t = 0; t < std::min(kPageTokens, data.tokens - page * kPageTokens); ++t) {
          for (int d = 0; d < data.shape.head_dim; ++d) {
            host.key(t, d) = data.keys[data.index(head, page * kPageTokens + t, d)];
            host.value(t, d) = data.values[data.index(head, page * kPageTokens + t, d)];
          }
        }
        (page < past_pages ? past : tail).write(head, page < past_pages ? page : page - past_pages, host.bytes());
      }
    }
    past.hold(std::vector<int>(static_cast<size_t>(data.shape.kv_heads), past_pages * kPageTokens));
  }
  LayerKv kv() const { return {past.view(), tail.view(), past_pages * kPageTokens}; }
  int past_pages;
  DevicePages past;
  DevicePages tail;
};

TEST(CudaTokenScores, KeysAloneTellTheirScores) {
  Random random(70);
  for (int round = 0; round < 16; ++round) {
    const KvShape shape{1, random.between(1, 3), 32 * (1 + round % 4)};
    const int tokens = round % 5 == 0 ? random.between(2000, 2600) : random.between(1, 400);
    const TokenData data = random_tokens(shape, tokens, random);
    for (const KeyMeasure measure : {KeyMeasure::smallness, KeyMeasure::difference}) {
      const std::vector<double> expected = expected_key_scores(data, measure);
      std::vector<float> first;
      for (int run = 0; run < 2; ++run) {
        const Placed placed(data, random.below((tokens + kPageTokens - 1) / kPageTokens), random);
        const DeviceArray<float> scratch(key_score_floats(tokens, shape) + 1);
        const DeviceArray<float> scores(expected.size() + 1);
        cuda::key_scores({shape, placed.kv(), tokens, measure, scratch.data(), scores.data()}, nullptr);
        finish();
        const std::vector<float> out = scores.read();
        ASSERT_TRUE(std::isnan(out.back()) && std::isnan(scratch.read().back())) << "what lies behind is not touched";
        for (size_t i = 0; i < expected.size(); ++i) {
          ASSERT_NEAR(out[i], expected[i], 1e-5 * std::abs(expected[i]) + 1e-6) << i << " of " << tokens;
        }
        first = run == 0 ? out : first;
        ASSERT_EQ(std::memcmp(out.data(), first.data(), expected.size() * sizeof(float)), 0);
      }
    }
  }
}

TEST(CudaTokenScores, ExpectedAttentionIsThatOfTheFormula) {
  Random random(71);
  for (int round = 0; round < 16; ++round) {
    const KvShape shape{1, random.between(1, 3), 32 * (1 + round % 4)};
    const int heads = shape.kv_heads * random.between(1, 4);
    const int tokens = random.between(round == 0 ? 1 : 40, round == 1 ? 3000 : 300);
    const TokenData data = random_tokens(shape, tokens, random);
    const int rows = std::min(tokens, random.between(1, 70));
    const QueryData queries = random_queries(shape, heads, rows, tokens - 1 + random.below(50), random);
    const int from = queries.position + rows;
    const int future = random.between(1, 90);
    const int positions = from + random.between(0, 100);  // some of the future may be unknown
    const int sinks = random.below(6);
    const DeviceArray<float> cos(queries.table(positions, [](double x) { return std::cos(x); }));
    const DeviceArray<float> sin(queries.table(positions, [](double x) { return std::sin(x); }));
    const DeviceArray<bf16> q(queries.q);
    const std::vector<double> expected = expected_attention_scores(data, queries, from, future, positions, sinks);
    std::vector<float> first;
    for (int run = 0; run < 2; ++run) {
      const Placed placed(data, random.below((tokens + kPageTokens - 1) / kPageTokens), random);
      const size_t bytes = expected_bytes(rows, tokens, shape);
      const DeviceArray<std::byte> scratch(bytes + 64);
      const DeviceArray<float> scores(expected.size() + 1);
      cuda::expected_attention({.shape = shape,
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
                                .scratch = scratch.data(),
                                .scores = scores.data()},
                               nullptr);
      finish();
      const std::vector<float> out = scores.read();
      ASSERT_TRUE(std::isnan(out.back()));
      const std::vector<std::byte> used = scratch.read();
      for (size_t i = bytes; i < used.size(); ++i) {
        ASSERT_EQ(used[i], std::byte{0xff}) << "what lies behind the scratch is not touched";
      }
      for (size_t i = 0; i < expected.size(); ++i) {
        if (std::isinf(expected[i])) {
          ASSERT_EQ(out[i], INFINITY);
        } else {
          ASSERT_NEAR(out[i], expected[i], 0.02 * expected[i]) << "round " << round << ", " << i << " of " << tokens;
        }
      }
      first = run == 0 ? out : first;
      ASSERT_EQ(std::memcmp(out.data(), first.data(), expected.size() * sizeof(float)), 0);
    }
  }
}

}  // namespace
}  // namespace vericache::test
