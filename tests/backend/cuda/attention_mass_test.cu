// Attention mass on a GPU against float64; its bits do not depend on where pages lie or where past ends.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/cuda/packed_fixture.h"

namespace vericache::test {
namespace {

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

// The keys of a sequence's tokens; the last page may be short, its other slots are garbage.
struct Keys {
  Keys(const KvShape& shape, int tokens, Random& random) : shape(shape), tokens(tokens) {
    for (int i = 0; i < shape.kv_heads * tokens * shape.head_dim; ++i) {
      values.push_back(to_bf16(random.normal()));
    }
  }
  bf16 at(int head, int token, int dim) const { return values[test::at(head * tokens + token, shape.head_dim, dim)]; }
  HostPage page(int head, int index, Random& random) const {
    HostPage out(shape.head_dim, &random);
    for (int t = 0; t < std::min(kPageTokens, tokens - index * kPageTokens); ++t) {
      for (int d = 0; d < shape.head_dim; ++d) {
        out.key(t, d) = at(head, index * kPageTokens + t, d);
      }
    }
    return out;
  }
  KvShape shape;
  int tokens;
  std::vector<bf16> values;
};

struct Rows {
  int capacity;
  int count;
  int position;  // of the first
  int heads;
  float scale;
  std::vector<bf16> q;             // (capacity, heads, head_dim)
  std::vector<float> log_sum_exp;  // (capacity, heads)
};

double score(const Keys& keys, const Rows& rows, int slot, int head, int token) {
  double sum = 0;
  const int kv_head = head / (rows.heads / keys.shape.kv_heads);
  for (int d = 0; d < keys.shape.head_dim; ++d) {
    sum += double{to_float(rows.q[at(slot * rows.heads + head, keys.shape.head_dim, d)])} *
           double{to_float(keys.at(kv_head, token, d))};
  }
  return double{rows.scale} * sum;
}

Rows random_rows(const Keys& keys, int heads, int capacity, int count, Random& random) {
  Rows rows{.capacity = capacity,
            .count = count,
            .position = keys.tokens - count,
            .heads = heads,
            .scale = 1.0f / std::sqrt(static_cast<float>(keys.shape.head_dim)),
            .q = random.bf16s(at(capacity * heads, keys.shape.head_dim), 1.5f),
            .log_sum_exp = random.floats(at(capacity, heads))};
  for (int r = 0; r < count; ++r) {
    const int slot = (rows.position + r) % capacity;
    for (int head = 0; head < heads; ++head) {
      double sum = 0;
      for (int token = 0; token <= rows.position + r; ++token) {
        sum += std::exp(score(keys, rows, slot, head, token));
      }
      rows.log_sum_exp[at(slot, heads, head)] = static_cast<float>(std::log(sum));
    }
  }
  return rows;
}

// Rows [first, end) of them, as a ring of their own where they are not all; into `mass` (kv_heads, stride), of which
// [0, added) are added to.
void run_rows(const Keys& keys, const Rows& rows, int first, int end, int past_pages, int stride, int added,
              const DeviceArray<float>& mass, Random& random, MassOf of = MassOf::sum) {
  const KvShape& shape = keys.shape;
  const int pages = (keys.tokens + kPageTokens - 1) / kPageTokens;
  DevicePages past(shape, {}, past_pages + 1, random);
  DevicePages tail(shape, {}, pages - past_pages + 1, random);
  for (int head = 0; head < shape.kv_heads; ++head) {
    for (int page = 0; page < pages; ++page) {
      (page < past_pages ? past : tail)
          .write(head, page < past_pages ? page : page - past_pages, keys.page(head, page, random).bytes());
    }
  }
  past.hold(std::vector<int>(static_cast<size_t>(shape.kv_heads), past_pages * kPageTokens));
  DeviceArray<bf16> q(rows.q);
  DeviceArray<float> log_sum_exp(rows.log_sum_exp);
  const bool alone = end - first < rows.count;
  const int slot = alone ? (rows.position + first) % rows.capacity : 0;
  cuda::attention_mass(
      {.shape = shape,
       .heads = rows.heads,
       .scale = rows.scale,
       .queries = {q.data() + at(slot * rows.heads, shape.head_dim), log_sum_exp.data() + at(slot, rows.heads),
                   alone ? end - first : rows.capacity, alone ? rows.position + first : 0},
       .rows = end - first,
       .position = rows.position + first,
       .kv = {past.view(), tail.view(), past_pages * kPageTokens},
       .tokens = keys.tokens,
       .mass = mass.data(),
       .stride = stride,
       .added = added,
       .of = of},
      nullptr);
  finish();
}

std::vector<float> run(const Keys& keys, const Rows& rows, int past_pages, Random& random) {
  const DeviceArray<float> mass(at(keys.shape.kv_heads, keys.tokens) + 64);
  run_rows(keys, rows, 0, rows.count, past_pages, keys.tokens, 0, mass, random);
  return mass.read();
}

TEST(CudaAttentionMass, IsThatOfTheSoftmax) {
  Random random(80);
  for (int round = 0; round < 24; ++round) {
    const int group = random.between(1, 9);
    const KvShape shape{1, random.between(1, 3), 32 * (1 + round % 4)};
    const int heads = group * shape.kv_heads;
    const Keys keys(shape, random.between(1, 700), random);
    const int count = std::min(keys.tokens, random.between(1, round % 5 == 0 ? 70 : 40));
    const int capacity = count + random.below(30);
    const Rows rows = random_rows(keys, heads, capacity, count, random);
    const int pages = (keys.tokens + kPageTokens - 1) / kPageTokens;
    const std::vector<float> mass = run(keys, rows, random.below(pages), random);
    for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      for (int token = 0; token < keys.tokens; ++token) {
        double expected = 0;
        for (int r = 0; r < count; ++r) {
          if (token > rows.position + r) {
            continue;
          }
          const int slot = (rows.position + r) % capacity;
          for (int h = 0; h < group; ++h) {
            const int head = kv_head * group + h;
            expected += std::exp(score(keys, rows, slot, head, token) - rows.log_sum_exp[at(slot, heads, head)]);
          }
        }
        ASSERT_NEAR(mass[at(kv_head, keys.tokens, token)], expected, 1e-3 * expected + 1e-9)
            << "round " << round << ", head " << kv_head << ", token " << token;
      }
    }
    for (size_t i = at(shape.kv_heads, keys.tokens); i < mass.size(); ++i) {
      ASSERT_TRUE(std::isnan(mass[i])) << "what lies behind the tokens is not touched";
    }
    const std::vector<float> elsewhere = run(keys, rows, random.below(pages), random);
    ASSERT_EQ(std::memcmp(mass.data(), elsewhere.data(), mass.size() * sizeof(float)), 0);
  }
}

// Row by row, each a ring of its own, on top of what the rows before left; tokens that are new are written.
TEST(CudaAttentionMass, AddsToWhatOtherRowsLeft) {
  Random random(82);
  for (int round = 0; round < 8; ++round) {
    const KvShape shape{1, random.between(1, 3), 32 * (1 + round % 4)};
    const Keys keys(shape, random.between(20, 400), random);
    const int count = random.between(2, 6);
    const Rows rows = random_rows(keys, 2 * shape.kv_heads, count + random.below(4), count, random);
    const int pages = (keys.tokens + kPageTokens - 1) / kPageTokens;
    const std::vector<float> whole = run(keys, rows, random.below(pages), random);
    const int stride = keys.tokens + random.below(9);
    const int old = random.below(keys.tokens);  // [old, tokens) hold garbage, what is before is zero
    std::vector<float> start(at(shape.kv_heads, stride), std::nanf(""));
    for (int head = 0; head < shape.kv_heads; ++head) {
      std::fill_n(start.begin() + static_cast<ptrdiff_t>(at(head, stride)), old, 0.0f);
    }
    DeviceArray<float> pieces(start);
    for (int row = 0; row < count; ++row) {
      run_rows(keys, rows, row, row + 1, random.below(pages), stride, row == 0 ? old : keys.tokens, pieces, random);
    }
    const std::vector<float> out = pieces.read();
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int token = 0; token < stride; ++token) {
        const float have = out[at(head, stride, token)];
        if (token < keys.tokens) {
          const float want = whole[at(head, keys.tokens, token)];
          ASSERT_NEAR(have, want, 1e-4f * want + 1e-7f) << "head " << head << ", token " << token;
        } else {
          ASSERT_TRUE(std::isnan(have));
        }
      }
    }
  }
}

// The largest weight of any row and query head, against float64; where rows are cut or pages lie changes no bit.
TEST(CudaAttentionMass, TheLargestWeightIsThatOfTheSoftmax) {
  Random random(83);
  for (int round = 0; round < 16; ++round) {
    const int group = random.between(1, 9);
    const KvShape shape{1, random.between(1, 3), 32 * (1 + round % 4)};
    const Keys keys(shape, random.between(2, 400), random);
    const int count = std::min(keys.tokens, random.between(2, round % 5 == 0 ? 90 : 30));
    const Rows rows = random_rows(keys, group * shape.kv_heads, count + random.below(4), count, random);
    const int pages = (keys.tokens + kPageTokens - 1) / kPageTokens;
    const int stride = keys.tokens + random.below(9);
    const DeviceArray<float> whole(at(shape.kv_heads, stride));
    run_rows(keys, rows, 0, count, random.below(pages), stride, 0, whole, random, MassOf::largest);
    const DeviceArray<float> pieces(at(shape.kv_heads, stride));
    for (int row = 0; row < count; ++row) {
      run_rows(keys, rows, row, row + 1, random.below(pages), stride, row == 0 ? 0 : keys.tokens, pieces, random,
               MassOf::largest);
    }
    const std::vector<float> all = whole.read();
    const std::vector<float> cut = pieces.read();
    for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      for (int token = 0; token < stride; ++token) {
        const float have = all[at(kv_head, stride, token)];
        if (token >= keys.tokens) {
          ASSERT_TRUE(std::isnan(have)) << "what lies behind the tokens is not touched";
          continue;
        }
        double most = 0;
        for (int r = std::max(0, token - rows.position); r < count; ++r) {
          const int slot = (rows.position + r) % rows.capacity;
          for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            most = std::max(
                most, std::exp(score(keys, rows, slot, head, token) - rows.log_sum_exp[at(slot, rows.heads, head)]));
          }
        }
        ASSERT_NEAR(have, most, 1e-3 * most + 1e-9) << "round " << round << ", token " << token;
        ASSERT_EQ(have, cut[at(kv_head, stride, token)]);
      }
    }
  }
}

TEST(CudaAttentionMass, NoRowsNoMass) {
  Random random(81);
  const Keys keys({1, 2, 64}, 100, random);
  const Rows rows{.capacity = 4,
                  .count = 0,
                  .position = 100,
                  .heads = 4,
                  .scale = 1.0f,
                  .q = random.bf16s(at(4 * 4, 64)),
                  .log_sum_exp = random.floats(16)};
  const std::vector<float> mass = run(keys, rows, 1, random);
  for (size_t i = 0; i < at(2, 100); ++i) {
    ASSERT_EQ(mass[i], 0.0f);
  }
}

}  // namespace
}  // namespace vericache::test
