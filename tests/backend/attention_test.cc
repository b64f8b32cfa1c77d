// Attention and attention mass of the CPU backend against float64, over formats, head sizes and ragged heads.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

class AttentionOp : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(Cpu, AttentionOp, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

struct Case {
  KvShape shape;
  int heads;
  KvFormat format;
  std::vector<int> past_tokens;  // per KV head
  int tail_position;
  int position;
  int rows;
  int threads;
};

// One sequence's KV: the past in its format, also as the bf16 pages that it stands for, and the tail.
struct Sequence {
  Sequence(Kernels& kernels, const Case& c, Random& random)
      : plain(c.shape, {}, pages_for(c), random),
        past(c.shape, c.format, pages_for(c), random),
        tail(c.shape, {}, pages_for(c), random) {
    const size_t n = static_cast<size_t>(c.shape.head_dim);
    plain.tokens() = past.tokens() = c.past_tokens;
    for (int head = 0; head < c.shape.kv_heads; ++head) {
      const int tokens = c.past_tokens[static_cast<size_t>(head)];
      for (int t = 0; t < tokens; ++t) {
        plain.write(head, t, random.bf16s(n).data(), random.bf16s(n).data());
      }
      for (int page = 0; page * kPageTokens < tokens; ++page) {
        const int held = std::min(kPageTokens, tokens - page * kPageTokens);
        kernels.quantize_head_page(plain.head_page(head, page), held, c.shape, c.format, past.head_page(head, page));
        kernels.dequantize_head_page(past.head_page(head, page), c.shape, c.format, plain.head_page(head, page));
      }
      for (int t = 0; t < c.position + c.rows - c.tail_position; ++t) {
        tail.write(head, t, random.bf16s(n).data(), random.bf16s(n).data());
      }
    }
  }
  static int pages_for(const Case& c) { return (c.position + c.rows) / kPageTokens + 2; }
  LayerKv kv(int tail_position) const { return {past.view(), tail.view(), tail_position}; }

  Pages plain;
  Pages past;
  Pages tail;
};

struct Expected {
  std::vector<double> out;
  double log_sum_exp = 0;
  double largest_value = 0;
  std::vector<double> scores;
};

Expected reference(const Case& c, const Sequence& s, const bf16* q, int head, int position, float scale) {
  const int kv_head = head / (c.heads / c.shape.kv_heads);
  const int past = c.past_tokens[static_cast<size_t>(kv_head)];
  const int tokens = past + position - c.tail_position + 1;
  Expected e;
  e.out.resize(static_cast<size_t>(c.shape.head_dim));
  double top = -1e300;
  for (int t = 0; t < tokens; ++t) {
    const Pages& pages = t < past ? s.plain : s.tail;
    const int token = t < past ? t : t - past;
    double dot = 0;
    for (int d = 0; d < c.shape.head_dim; ++d) {
      dot += double{to_float(q[d])} * to_float(pages.key(kv_head, token, d));
    }
    e.scores.push_back(dot * scale);
    top = std::max(top, e.scores.back());
  }
  double sum = 0;
  for (const double score : e.scores) {
    sum += std::exp(score - top);
  }
  e.log_sum_exp = top + std::log(sum);
  for (int t = 0; t < tokens; ++t) {
    const Pages& pages = t < past ? s.plain : s.tail;
    const int token = t < past ? t : t - past;
    for (int d = 0; d < c.shape.head_dim; ++d) {
      const double value = to_float(pages.value(kv_head, token, d));
      e.out[static_cast<size_t>(d)] += std::exp(e.scores[static_cast<size_t>(t)] - e.log_sum_exp) * value;
      e.largest_value = std::max(e.largest_value, std::abs(value));
    }
  }
  return e;
}

void check_case(Isa isa, const Case& c, Random& random) {
  const auto kernels = make_cpu_kernels(
      isa, c.threads, {.shape = c.shape, .heads = c.heads, .max_rows = 600, .max_context_tokens = 4096});
  const Sequence s(*kernels, c, random);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.shape.head_dim));
  std::vector<bf16> q(at(c.rows * c.heads, c.shape.key_dim()), bf16{0});
  for (int i = 0; i < c.rows * c.heads; ++i) {
    for (int d = 0; d < c.shape.head_dim; ++d) {
      q[at(i, c.shape.key_dim(), d)] = to_bf16(random.normal(1.5f));
    }
  }
  const int width = padded_dim(c.heads * c.shape.head_dim);
  std::vector<bf16> out(at(c.rows, width), bf16{0x7fc0});
  std::vector<float> lse(at(c.rows, c.heads));
  const SequenceRows rows{0, c.rows, c.position, nullptr, s.kv(c.tail_position)};
  const PassRows pass = one_layer({&rows, 1});
  kernels->stage(pass);
  kernels->attention({c.shape, c.heads, scale, q.data(), &pass, 0, out.data(), lse.data()});
  for (int r = 0; r < c.rows; r += std::max(1, c.rows / 5)) {
    for (int h = 0; h < c.heads; ++h) {
      const Expected e = reference(c, s, q.data() + at(r * c.heads + h, c.shape.key_dim()), h, c.position + r, scale);
      ASSERT_NEAR(lse[at(r, c.heads, h)], e.log_sum_exp, 5e-3);
      for (int d = 0; d < c.shape.head_dim; ++d) {
        ASSERT_NEAR(to_float(out[at(r, width, h * c.shape.head_dim + d)]), e.out[static_cast<size_t>(d)],
                    e.largest_value / 256)
            << "row " << r << " head " << h << " dim " << d;
      }
    }
    for (int i = c.heads * c.shape.head_dim; i < width; ++i) {
      ASSERT_EQ(out[at(r, width, i)].bits, 0);
    }
  }
}

TEST_P(AttentionOp, HeadSizesAndGroupsMatchFloat64) {
  Random random(10);
  for (const int head_dim : {16, 32, 64, 80, 128}) {
    for (const int group : {1, 2, 4, 7}) {
      const KvShape shape{1, 2, head_dim};
      check_case(GetParam(), {shape, 2 * group, {}, {128, 128}, 128, 150, 21, 2}, random);
    }
  }
}

TEST_P(AttentionOp, FormatsMatchFloat64) {
  Random random(11);
  for (const int key_bits : {2, 3, 4, 6, 8, 16}) {
    for (const int value_bits : {2, 3, 4, 6, 8, 16}) {
      for (const int head_dim : {48, 64}) {
        check_case(GetParam(), {{1, 2, head_dim}, 4, {key_bits, value_bits}, {192, 70}, 256, 257, 3, 2}, random);
      }
    }
  }
}

TEST_P(AttentionOp, FormatsByTokenMatchFloat64) {
  Random random(15);
  for (const KvFormat& format :
       {KvFormat{6, 6, KvCode::plane}, KvFormat{7, 9, KvCode::plane}, KvFormat{8, 8, KvCode::plane},
        KvFormat{9, 16, KvCode::plane}, KvFormat{8, 8, KvCode::fp8}, KvFormat{8, 8, KvCode::int8}}) {
    for (const int head_dim : {48, 64}) {
      check_case(GetParam(), {{1, 2, head_dim}, 4, format, {192, 70}, 256, 257, 3, 2}, random);
    }
  }
}

// Splits that hold past alone, tail alone, and both.
TEST_P(AttentionOp, RotatedFormatsMatchFloat64) {
  Random random(16);
  for (const KvFormat& format : {KvFormat{4, 4, KvCode::affine, true}, KvFormat{3, 8, KvCode::affine, true},
                                 KvFormat{16, 2, KvCode::affine, true}}) {
    for (const int head_dim : {48, 64}) {
      check_case(GetParam(), {{1, 2, head_dim}, 4, format, {192, 70}, 256, 257, 3, 2}, random);
    }
    check_case(GetParam(), {{1, 1, 64}, 2, format, {2240}, 2240, 2290, 2, 2}, random);
    check_case(GetParam(), {{1, 2, 32}, 2, format, {1024, 0}, 1024, 1100, 1, 1}, random);
  }
}

TEST_P(AttentionOp, RaggedHeadsMatchFloat64) {
  Random random(12);
  for (const auto& tokens : {std::vector<int>{0, 1, 64}, {63, 65, 0}, {1100, 3, 200}, {0, 0, 0}}) {
    for (const int threads : {1, 3}) {
      check_case(GetParam(), {{1, 3, 32}, 6, {}, tokens, 1216, 1300, 5, threads}, random);
    }
  }
}

TEST_P(AttentionOp, LongContextsAndManyRowsMatchFloat64) {
  Random random(13);
  check_case(GetParam(), {{1, 1, 64}, 2, {}, {2240}, 2240, 2290, 1, 2}, random);
  check_case(GetParam(), {{1, 1, 64}, 2, {}, {2240}, 2240, 2290, 200, 2}, random);
  check_case(GetParam(), {{1, 2, 64}, 4, {4, 4}, {2240, 1500}, 2240, 2290, 1, 2}, random);
  check_case(GetParam(), {{1, 2, 64}, 4, {}, {0, 0}, 0, 0, 300, 2}, random);
}

TEST_P(AttentionOp, MassMatchesFloat64AndAddsUp) {
  Random random(14);
  const Case c{{1, 2, 32}, 6, {}, {192, 192}, 192, 250, 75, 2};
  const auto kernels = make_cpu_kernels(
      GetParam(), c.threads, {.shape = c.shape, .heads = c.heads, .max_rows = 600, .max_context_tokens = 4096});
  const Sequence s(*kernels, c, random);
  const float scale = 0.2f;
  const auto q = random.bf16s(at(c.rows * c.heads, c.shape.key_dim()));
  std::vector<bf16> out(at(c.rows, padded_dim(c.heads * c.shape.head_dim)));
  std::vector<float> lse(at(c.rows, c.heads));
  const int skipped = 10;  // the last rows alone vote, as in SnapKV: the ring forgets the others
  std::vector<bf16> ring_q(at(c.rows - skipped, c.heads * c.shape.key_dim()));
  std::vector<float> ring_lse(at(c.rows - skipped, c.heads));
  const QueryRing ring{ring_q.data(), ring_lse.data(), c.rows - skipped};
  const SequenceRows rows{0, c.rows, c.position, nullptr, s.kv(c.tail_position), ring};
  const PassRows pass = one_layer({&rows, 1});
  kernels->stage(pass);
  kernels->attention({c.shape, c.heads, scale, q.data(), &pass, 0, out.data(), lse.data()});
  kernels->keep_queries(q.data(), lse.data(), c.heads, c.shape, pass, 0);
  const int tokens = c.position + c.rows;
  std::vector<float> mass(at(c.shape.kv_heads, tokens), std::nanf(""));
  kernels->attention_mass(
      {c.shape, c.heads, scale, ring, c.rows - skipped, c.position + skipped, rows.kv, tokens, mass.data(), tokens});
  std::vector<double> expected(mass.size(), 0.0);
  for (int r = skipped; r < c.rows; ++r) {
    for (int h = 0; h < c.heads; ++h) {
      const Expected e = reference(c, s, q.data() + at(r * c.heads + h, c.shape.key_dim()), h, c.position + r, scale);
      for (size_t t = 0; t < e.scores.size(); ++t) {
        expected[at(h / 3, tokens) + t] += std::exp(e.scores[t] - e.log_sum_exp);
      }
    }
  }
  double total = 0;
  for (size_t i = 0; i < mass.size(); ++i) {
    ASSERT_NEAR(mass[i], expected[i], 0.01 * expected[i]);
    total += mass[i];
  }
  EXPECT_NEAR(total, (c.rows - skipped) * c.heads, 0.5);
}

}  // namespace
}  // namespace vericache::test
