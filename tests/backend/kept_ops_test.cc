// The ops that compressors are made of: what they keep, against the plainest way to say it.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

class KeptOps : public testing::TestWithParam<Isa> {
 protected:
  std::unique_ptr<Kernels> kernels(const KvShape& shape = {1, 1, 16}, int heads = 1, int threads = 3) {
    return make_cpu_kernels(
        GetParam(), threads,
        {.shape = shape, .heads = heads * shape.kv_heads, .max_rows = 64, .max_context_tokens = 10000});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, KeptOps, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

TEST_P(KeptOps, PoolMassIsTheMeanOfTheNeighbours) {
  Random random(40);
  const auto k = kernels();
  for (int round = 0; round < 60; ++round) {
    const int rows = random.between(1, 4);
    const int n = round % 6 == 0 ? random.between(4000, 9000) : random.between(1, 300);
    const int reach = random.below(round % 3 == 0 ? 128 : 5);
    const int always = random.below(round % 4 == 0 ? n + 20 : 40);
    std::vector<float> mass(at(rows, n));
    for (float& x : mass) {
      x = std::abs(random.normal(std::exp(random.normal(3.0f))));
    }
    std::vector<float> scores(at(rows, n) + 1, std::nanf(""));
    scores.back() = 42.0f;
    k->pool_mass(mass.data(), rows, n, reach, always, scores.data());
    EXPECT_EQ(scores.back(), 42.0f);
    for (int row = 0; row < rows; ++row) {
      for (int token = 0; token < n; ++token) {
        double sum = 0;
        for (int i = std::max(0, token - reach); i <= std::min(n - 1, token + reach); ++i) {
          sum += mass[at(row, n, i)];
        }
        const float score = scores[at(row, n, token)];
        if (token >= n - always) {
          ASSERT_EQ(score, kInfinity);
        } else {
          ASSERT_NEAR(score, sum / (2 * reach + 1), 3e-5 * sum / (2 * reach + 1)) << token << " of " << n;
        }
      }
    }
  }
}

// The sum runs in rising order wherever the token lies: equal neighbourhoods have equal scores.
TEST_P(KeptOps, PoolMassDoesNotDependOnThePlace) {
  Random random(41);
  const auto k = kernels();
  const int reach = 3;
  const int period = 37;
  const auto pattern = random.floats(static_cast<size_t>(period));
  std::vector<float> mass(at(1, 9000));
  for (size_t i = 0; i < mass.size(); ++i) {
    mass[i] = pattern[i % pattern.size()];
  }
  std::vector<float> scores(mass.size());
  k->pool_mass(mass.data(), 1, 9000, reach, 0, scores.data());
  for (size_t i = static_cast<size_t>(period + reach); i + reach < scores.size(); ++i) {
    ASSERT_EQ(scores[i], scores[i - static_cast<size_t>(period)]);
  }
}

TEST_P(KeptOps, ChooseBestKeepsTheBestAndOfEqualsTheLater) {
  Random random(42);
  const auto k = kernels();
  for (int round = 0; round < 200; ++round) {
    const int rows = random.between(1, 5);
    const int n = round % 20 == 0 ? random.between(5000, 10000) : random.between(1, 200);
    const int count = random.below(3) == 0 ? n : random.below(n + 1);
    const int stride = count + random.below(10);
    std::vector<int> counts(static_cast<size_t>(rows), count);
    const bool differ = round % 3 == 0;
    for (int& one : counts) {
      one = differ ? random.below(count + 1) : count;
    }
    std::vector<float> scores(at(rows, n));
    for (float& x : scores) {
      const int draw = random.below(12);  // few values: ties everywhere
      x = draw == 0   ? kInfinity
          : draw == 1 ? -kInfinity
          : draw == 2 ? std::nanf("")
          : draw == 3 ? -0.0f
          : draw == 4 ? 0.0f
          : draw == 5 ? 1e-40f
          : draw == 6 ? -std::nanf("")
                      : static_cast<float>(draw - 9);
    }
    const std::vector<float> before = scores;
    std::vector<int> chosen(at(rows, stride) + 1, -7);
    k->choose_best({.scores = scores.data(),
                    .rows = rows,
                    .n = n,
                    .count = count,
                    .counts = differ ? counts.data() : nullptr,
                    .chosen = chosen.data(),
                    .stride = stride});
    ASSERT_EQ(std::memcmp(scores.data(), before.data(), scores.size() * sizeof(float)), 0) << "scores are read";
    for (int row = 0; row < rows; ++row) {
      std::vector<int> order(static_cast<size_t>(n));
      std::iota(order.rbegin(), order.rend(), 0);
      const auto worth = [&](int token) {
        const float score = scores[at(row, n, token)];
        return std::isnan(score) ? -kInfinity : score;
      };
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return worth(a) > worth(b); });
      const int own = counts[static_cast<size_t>(row)];
      order.resize(static_cast<size_t>(own));
      std::sort(order.begin(), order.end());
      const auto first = chosen.begin() + static_cast<ptrdiff_t>(at(row, stride));
      ASSERT_EQ(std::vector<int>(first, first + own), order) << own << " of " << n;
      for (int i = own; i < stride; ++i) {
        ASSERT_EQ(first[i], -7) << "what lies behind a row's choice is not touched";
      }
    }
    ASSERT_EQ(chosen.back(), -7);
  }
}

// All rows as one, longer than a context: which of all scores are the best, and how many of them each row has.
TEST_P(KeptOps, TheBestOfAllRowsAreCountedByRows) {
  Random random(46);
  for (int round = 0; round < 20; ++round) {
    const KvShape shape{1, random.between(1, 6), 16};
    const auto k = kernels(shape, 1);
    const int n = round % 5 == 0 ? 10000 : random.between(1, 300);
    const int all = shape.kv_heads * n;
    const int count = random.below(all + 1);
    std::vector<float> scores(static_cast<size_t>(all));
    for (float& x : scores) {
      x = static_cast<float>(random.below(50));
    }
    std::vector<int> chosen(static_cast<size_t>(all) + 1, -7);
    std::vector<int> counts(static_cast<size_t>(shape.kv_heads) + 1, -7);
    k->choose_best(
        {.scores = scores.data(), .rows = 1, .n = all, .count = count, .chosen = chosen.data(), .stride = count});
    k->count_rows(chosen.data(), count, shape.kv_heads, n, counts.data());
    ASSERT_EQ(counts.back(), -7);
    std::vector<int> order(static_cast<size_t>(all));
    std::iota(order.rbegin(), order.rend(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
    std::vector<int> expected(static_cast<size_t>(shape.kv_heads));
    for (int i = 0; i < count; ++i) {
      ++expected[static_cast<size_t>(order[static_cast<size_t>(i)] / n)];
    }
    counts.pop_back();
    ASSERT_EQ(counts, expected);
  }
}

TEST_P(KeptOps, MeanRowsAreAllTheSame) {
  Random random(47);
  const auto k = kernels();
  for (const auto& [rows, n] : {std::pair{1, 5}, {3, 1}, {4, 9001}, {7, 64}}) {
    const std::vector<float> before = random.floats(at(rows, n));
    std::vector<float> values = before;
    values.push_back(42.0f);
    k->mean_rows(values.data(), rows, n);
    EXPECT_EQ(values.back(), 42.0f);
    for (int token = 0; token < n; ++token) {
      double sum = 0;
      for (int row = 0; row < rows; ++row) {
        sum += before[at(row, n, token)];
      }
      for (int row = 0; row < rows; ++row) {
        ASSERT_NEAR(values[at(row, n, token)], sum / rows, 1e-6);
        ASSERT_EQ(values[at(row, n, token)], values[at(0, n, token)]);
      }
    }
  }
}

// Full KV of `pages` pages, of which the first `past_pages` are seen as past.
struct Full {
  Full(const KvShape& shape, int count, int past, Random& random)
      : pages(shape, {}, count, random), past_pages(past), tokens(static_cast<size_t>(shape.kv_heads)) {
    const size_t n = static_cast<size_t>(shape.head_dim);
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int t = 0; t < count * kPageTokens; ++t) {
        pages.write(head, t, random.bf16s(n).data(), random.bf16s(n).data());
      }
    }
    std::fill(tokens.begin(), tokens.end(), past * kPageTokens);
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

void poison(const Pages& pages, const KvShape& shape, const KvFormat& format, int count) {
  for (int head = 0; head < shape.kv_heads; ++head) {
    for (int page = 0; page < count; ++page) {
      std::fill_n(pages.head_page(head, page), head_page_bytes(format, shape), std::byte{0xa5});
    }
  }
}

KvFormat random_format(Random& random) {
  const KvFormat formats[] = {{2 << random.below(4), 2 << random.below(3)},
                              {6, 3},
                              {6 + random.below(4), 6 + random.below(4), KvCode::plane},
                              {8, 8, random.below(2) == 0 ? KvCode::fp8 : KvCode::int8},
                              {4, 3, KvCode::affine, true}};
  return formats[random.below(5)];
}

TEST_P(KeptOps, QuantizeWritesPagesOfViewsAsHeadPagesAlone) {
  Random random(43);
  for (int round = 0; round < 12; ++round) {
    const KvShape shape{1, random.between(1, 3), 16 * random.between(1, 6)};
    KvFormat format = round % 4 == 0 ? KvFormat{} : random_format(random);
    format.choice.bounded = round % 3 == 0;
    const auto k = kernels(shape);
    const int pages = random.between(1, 9);
    const Full full(shape, pages, random.below(pages + 1), random);
    const int first = random.below(pages);
    const int count = random.between(0, pages - first);
    Pages out(shape, format, pages, random, false);
    poison(out, shape, format, pages);
    k->quantize({.shape = shape, .full = full.kv(), .first = first, .count = count, .out = out.view()});
    const size_t bytes = head_page_bytes(format, shape);
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int page = 0; page < pages; ++page) {
        std::vector<std::byte> expected(bytes, std::byte{0xa5});
        if (page >= first && page < first + count) {
          k->quantize_head_page(full.pages.head_page(head, page), kPageTokens, shape, format, expected.data());
        }
        ASSERT_EQ(std::memcmp(out.head_page(head, page), expected.data(), bytes), 0) << "page " << page;
      }
    }
  }
}

TEST_P(KeptOps, GatherStoresTheChosenTokensAndZeroesTheRest) {
  Random random(44);
  for (int round = 0; round < 20; ++round) {
    const KvShape shape{1, random.between(1, 3), 16 * random.between(1, 6)};
    KvFormat format = round % 2 == 0 ? KvFormat{} : random_format(random);
    format.choice.bounded = round % 5 < 2;
    const auto k = kernels(shape);
    const int pages = random.between(1, 9);
    const Full full(shape, pages, random.below(pages + 1), random);
    const int count = random.between(1, pages * kPageTokens);
    const int stride = count + random.below(5);
    std::vector<int> chosen(at(shape.kv_heads, stride), -1);
    std::vector<int> counts(static_cast<size_t>(shape.kv_heads), count);
    const bool differ = round % 3 == 0;
    for (int& one : counts) {
      one = differ ? random.below(count + 1) : count;
    }
    for (int head = 0; head < shape.kv_heads; ++head) {
      std::vector<int> all(static_cast<size_t>(pages * kPageTokens));
      std::iota(all.begin(), all.end(), 0);
      std::sample(all.begin(), all.end(), chosen.begin() + static_cast<ptrdiff_t>(at(head, stride)),
                  counts[static_cast<size_t>(head)], random.engine());
    }
    Pages out(shape, format, pages, random, false);
    poison(out, shape, format, pages);
    k->gather({.shape = shape,
               .full = full.kv(),
               .chosen = chosen.data(),
               .stride = stride,
               .count = count,
               .counts = differ ? counts.data() : nullptr,
               .out = out.view()});
    Pages gathered(shape, {}, pages, random, false);  // zero, then token by token
    const size_t bytes = head_page_bytes(format, shape);
    for (int head = 0; head < shape.kv_heads; ++head) {
      std::vector<bf16> key(static_cast<size_t>(shape.head_dim));
      std::vector<bf16> value(key.size());
      const int own = counts[static_cast<size_t>(head)];
      const int kept_pages = (own + kPageTokens - 1) / kPageTokens;
      for (int i = 0; i < own; ++i) {
        for (int d = 0; d < shape.head_dim; ++d) {
          const int token = chosen[at(head, stride, i)];
          key[static_cast<size_t>(d)] = full.pages.key(head, token, d);
          value[static_cast<size_t>(d)] = full.pages.value(head, token, d);
        }
        gathered.write(head, i, key.data(), value.data());
      }
      for (int page = 0; page < pages; ++page) {
        std::vector<std::byte> expected(bytes, std::byte{0xa5});
        if (page < kept_pages) {
          const int held = std::min(kPageTokens, own - page * kPageTokens);
          k->quantize_head_page(gathered.head_page(head, page), held, shape, format, expected.data());
        }
        ASSERT_EQ(std::memcmp(out.head_page(head, page), expected.data(), bytes), 0) << "page " << page;
      }
    }
  }
}

// Passes of random lengths, some longer than the ring: every position's row is found where the ring says.
TEST_P(KeptOps, KeepQueriesIsARing) {
  Random random(45);
  const KvShape shape{2, 2, 48};  // keys are padded to 64
  const int heads = 6;
  const int width = heads * shape.key_dim();
  const auto k = kernels(shape, 3);
  for (int round = 0; round < 10; ++round) {
    const int capacity = random.between(1, 20);
    std::vector<bf16> ring_q(at(capacity, width), bf16{0x7fc0});
    std::vector<float> ring_lse(at(capacity, heads), std::nanf(""));
    std::vector<std::vector<bf16>> q_of(1);  // by position
    std::vector<std::vector<float>> lse_of(1);
    int position = random.below(3);
    const int start = position;
    q_of.resize(static_cast<size_t>(position));
    lse_of.resize(static_cast<size_t>(position));
    for (int pass_index = 0; pass_index < 6; ++pass_index) {
      const int rows = random.between(1, 30);
      const auto q = random.bf16s(at(rows + 4, width));
      const auto lse = random.floats(at(rows + 4, heads));
      // Layer 0 keeps nothing, layer 1 does; beside it a sequence whose queries nobody wants.
      const QueryRing ring{ring_q.data(), ring_lse.data(), capacity};
      const SequenceRows sequences[] = {{.first_row = 0, .rows = 3, .position = 7},
                                        {.first_row = 4, .rows = rows, .position = position},
                                        {.first_row = 0, .rows = 3, .position = 7},
                                        {.first_row = 4, .rows = rows, .position = position, .queries = ring}};
      const PassRows pass{.rows = rows + 4, .layers = 2, .sequences = sequences};
      k->stage(pass);
      const auto before = ring_q;
      k->keep_queries(q.data(), lse.data(), heads, shape, pass, 0);
      ASSERT_TRUE(ring_q == before);
      k->keep_queries(q.data(), lse.data(), heads, shape, pass, 1);
      for (int r = 0; r < rows; ++r) {
        const auto row = q.begin() + static_cast<ptrdiff_t>(at(4 + r, width));
        q_of.emplace_back(row, row + width);
        const auto row_lse = lse.begin() + static_cast<ptrdiff_t>(at(4 + r, heads));
        lse_of.emplace_back(row_lse, row_lse + heads);
      }
      position += rows;
      for (int p = std::max(start, position - capacity); p < position; ++p) {
        const int slot = p % capacity;
        const auto row = ring_q.begin() + static_cast<ptrdiff_t>(at(slot, width));
        ASSERT_TRUE(std::vector<bf16>(row, row + width) == q_of[static_cast<size_t>(p)]) << "position " << p;
        const auto row_lse = ring_lse.begin() + static_cast<ptrdiff_t>(at(slot, heads));
        ASSERT_EQ(std::vector<float>(row_lse, row_lse + heads), lse_of[static_cast<size_t>(p)]);
      }
    }
  }
}

}  // namespace
}  // namespace vericache::test
