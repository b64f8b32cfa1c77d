// Row-wise ops and products of the CPU backend against float64.
#include <gtest/gtest.h>

#include <cmath>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

constexpr double kBf16 = 1.0 / 256;  // one rounding to bf16, with room for fp32 sums

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

std::unique_ptr<Kernels> kernels_of(Isa isa, int threads = 2, KvShape shape = {1, 1, 16}, int heads = 1) {
  return make_cpu_kernels(isa, threads, {.shape = shape, .heads = heads, .max_rows = 512, .max_context_tokens = 4096});
}

class Ops : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(Cpu, Ops, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

TEST_P(Ops, MatmulMatchesFloat64) {
  Random random(1);
  const auto kernels = kernels_of(GetParam());
  const int shapes[][2] = {{16, 32}, {48, 64}, {100, 80}, {7, 512}, {331, 600}, {64, 1056}, {272, 16}};
  for (const auto& [out, in] : shapes) {
    const auto weight = random.bf16s(at(out, in));
    const Packed packed = pack(*kernels, weight, out, in);
    for (const int rows : {1, 2, 3, 5, 6, 7, 13, 17, 33, 70, 201}) {
      const auto x = random.rows(rows, in);
      for (const Epilogue epilogue : {Epilogue::store, Epilogue::add}) {
        const auto before = random.floats(at(rows, out));
        auto y = before;
        y.push_back(42.0f);
        kernels->matmul(packed.matrix, x.data(), rows, y.data(), epilogue);
        EXPECT_EQ(y.back(), 42.0f);
        double worst = 0;
        for (int r = 0; r < rows; ++r) {
          for (int o = 0; o < out; ++o) {
            double sum = epilogue == Epilogue::add ? before[at(r, out, o)] : 0;
            double size = std::abs(sum);
            for (int i = 0; i < in; ++i) {
              const double term = double{to_float(x[at(r, padded_dim(in), i)])} * to_float(weight[at(o, in, i)]);
              sum += term;
              size += std::abs(term);
            }
            worst = std::max(worst, std::abs(y[at(r, out, o)] - sum) / size);
          }
        }
        EXPECT_LT(worst, 4e-7) << rows << " rows of " << out << " x " << in;
      }
    }
  }
}

TEST_P(Ops, EmbedReadsRowsOfThePackedMatrix) {
  Random random(2);
  const auto kernels = kernels_of(GetParam());
  const int vocabulary = 101;
  const int dim = 72;
  const auto weight = random.bf16s(at(vocabulary, dim));
  const Packed packed = pack(*kernels, weight, vocabulary, dim);
  std::vector<TokenId> tokens;
  for (int i = 0; i < 300; ++i) {
    tokens.push_back(i < 101 ? i : random.below(vocabulary));
  }
  std::vector<float> out(at(300, dim));
  // Two sequences: tokens [0, 120) from position 0 on, the rest from position 57 on, in rows that stand 9 behind it.
  std::vector<TokenId> first(tokens.begin(), tokens.begin() + 120);
  std::vector<TokenId> second(57, -1);
  second.insert(second.end(), tokens.begin() + 120, tokens.end());
  const SequenceRows sequences[] = {
      {.first_row = 120, .rows = 180, .position = 66, .tokens = second.data(), .token_lag = 9},
      {.first_row = 0, .rows = 120, .position = 0, .tokens = first.data()}};
  const PassRows pass = one_layer(sequences);
  kernels->stage(pass);
  kernels->embed(packed.matrix, pass, out.data());
  for (int r = 0; r < 300; ++r) {
    for (int i = 0; i < dim; ++i) {
      ASSERT_EQ(out[at(r, dim, i)], to_float(weight[at(tokens[static_cast<size_t>(r)], dim, i)]));
    }
  }
}

TEST_P(Ops, AddBias) {
  Random random(3);
  const auto kernels = kernels_of(GetParam());
  const auto bias = random.floats(83);
  auto y = random.floats(at(250, 83));
  const auto before = y;
  kernels->add_bias(bias.data(), 250, 83, y.data());
  for (int r = 0; r < 250; ++r) {
    for (int i = 0; i < 83; ++i) {
      ASSERT_EQ(y[at(r, 83, i)], before[at(r, 83, i)] + bias[static_cast<size_t>(i)]);
    }
  }
}

TEST_P(Ops, RmsNormMatchesFloat64AndZeroesThePadding) {
  Random random(4);
  const auto kernels = kernels_of(GetParam());
  for (const int dim : {1, 16, 31, 72, 512, 1000}) {
    for (const int rows : {1, 3, 70}) {
      const auto x = random.floats(at(rows, dim), 3.0f);
      const auto weight = random.floats(static_cast<size_t>(dim));
      std::vector<bf16> out(at(rows, padded_dim(dim)), bf16{0x7fc0});
      kernels->rms_norm(x.data(), weight.data(), 1e-5f, rows, dim, out.data());
      for (int r = 0; r < rows; ++r) {
        double squares = 0;
        for (int i = 0; i < dim; ++i) {
          squares += double{x[at(r, dim, i)]} * x[at(r, dim, i)];
        }
        for (int i = 0; i < padded_dim(dim); ++i) {
          const float got = to_float(out[at(r, padded_dim(dim), i)]);
          if (i >= dim) {
            ASSERT_EQ(got, 0.0f);
            continue;
          }
          const double expected = x[at(r, dim, i)] / std::sqrt(squares / dim + 1e-5) * weight[static_cast<size_t>(i)];
          ASSERT_NEAR(got, expected, std::abs(expected) * kBf16);
        }
      }
    }
  }
}

TEST_P(Ops, SiluMulMatchesFloat64AndZeroesThePadding) {
  Random random(5);
  const auto kernels = kernels_of(GetParam());
  for (const int dim : {1, 40, 1280}) {
    for (const int rows : {1, 9}) {
      auto gate_up = random.floats(at(rows, 2 * dim), 6.0f);
      gate_up[0] = -300.0f;
      std::vector<bf16> out(at(rows, padded_dim(dim)), bf16{0x7fc0});
      kernels->silu_mul(gate_up.data(), rows, dim, out.data());
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < padded_dim(dim); ++i) {
          const float got = to_float(out[at(r, padded_dim(dim), i)]);
          if (i >= dim) {
            ASSERT_EQ(got, 0.0f);
            continue;
          }
          const double gate = gate_up[at(r, 2 * dim, i)];
          const double expected = gate / (1 + std::exp(-gate)) * gate_up[at(r, 2 * dim, dim + i)];
          ASSERT_NEAR(got, expected, std::abs(expected) * kBf16 + 1e-30);
        }
      }
    }
  }
}

// One head by the book: bias, RMSNorm, rotate-half RoPE.
std::vector<double> reference_head(const float* x, const float* bias, const float* norm, double eps, const float* cos,
                                   const float* sin, int head_dim) {
  const size_t n = static_cast<size_t>(head_dim);
  std::vector<double> h(n);
  double squares = 0;
  for (size_t i = 0; i < n; ++i) {
    h[i] = double{x[i]} + (bias == nullptr ? 0 : double{bias[i]});
    squares += h[i] * h[i];
  }
  for (size_t i = 0; norm != nullptr && i < n; ++i) {
    h[i] = h[i] / std::sqrt(squares / head_dim + eps) * norm[i];
  }
  std::vector<double> out = h;
  for (size_t i = 0; cos != nullptr && i < n / 2; ++i) {
    out[i] = h[i] * cos[i] - h[i + n / 2] * sin[i];
    out[i + n / 2] = h[i + n / 2] * cos[i] + h[i] * sin[i];
  }
  return out;
}

struct QkvCase {
  int head_dim;
  int kv_heads;
  int group;
  bool bias;
  bool norm;
};

void check_store_qkv(Isa isa, const QkvCase& c, Random& random) {
  const KvShape shape{1, c.kv_heads, c.head_dim};
  const int heads = c.kv_heads * c.group;
  const auto kernels = kernels_of(isa, 2, shape, heads);
  const int rows = 75;
  const int width = (heads + 2 * c.kv_heads) * c.head_dim;
  const auto qkv = random.floats(at(rows, width));
  const auto bias = random.floats(static_cast<size_t>(width));
  const auto q_norm = random.floats(static_cast<size_t>(c.head_dim));
  const auto k_norm = random.floats(static_cast<size_t>(c.head_dim));
  const auto cos = random.floats(at(400, c.head_dim / 2));
  const auto sin = random.floats(at(400, c.head_dim / 2));
  Pages first(shape, {}, 4, random);
  Pages second(shape, {}, 4, random);
  const SequenceRows sequences[] = {{0, 70, 100, nullptr, {{}, first.view(), 64}},
                                    {70, 5, 261, nullptr, {{}, second.view(), 128}}};
  const PassRows pass = one_layer(sequences);
  kernels->stage(pass);
  std::vector<bf16> q(at(rows * heads, shape.key_dim()), bf16{0x7fc0});
  QkvArgs args{.shape = shape, .heads = heads, .qkv = qkv.data()};
  args.bias = c.bias ? bias.data() : nullptr;
  args.q_norm = c.norm ? q_norm.data() : nullptr;
  args.k_norm = c.norm ? k_norm.data() : nullptr;
  args.norm_eps = 1e-6f;
  args.rope = {cos.data(), sin.data(), 400};
  args.pass = &pass;
  args.q = q.data();
  kernels->store_qkv(args);
  for (int r = 0; r < rows; ++r) {
    const bool in_first = r < 70;
    const int position = in_first ? 100 + r : 261 + r - 70;
    const int slot = position - (in_first ? 64 : 128);
    const Pages& pages = in_first ? first : second;
    for (int h = 0; h < heads + 2 * c.kv_heads; ++h) {
      const bool is_q = h < heads;
      const bool is_v = h >= heads + c.kv_heads;
      const float* norm = is_v ? nullptr : (is_q ? args.q_norm : args.k_norm);
      const float* cos_row = is_v ? nullptr : cos.data() + at(position, c.head_dim / 2);
      const auto expected =
          reference_head(qkv.data() + at(r, width, h * c.head_dim), c.bias ? bias.data() + h * c.head_dim : nullptr,
                         norm, 1e-6, cos_row, sin.data() + at(position, c.head_dim / 2), c.head_dim);
      for (int d = 0; d < (is_v ? c.head_dim : shape.key_dim()); ++d) {
        const int head = is_v ? h - heads - c.kv_heads : h - heads;
        const bf16 got = is_q ? q[at(r * heads + h, shape.key_dim(), d)]
                              : (is_v ? pages.value(head, slot, d) : pages.key(head, slot, d));
        const double want = d < c.head_dim ? expected[static_cast<size_t>(d)] : 0.0;
        ASSERT_NEAR(to_float(got), want, d < c.head_dim ? std::abs(want) * kBf16 + 1e-5 : 0.0);
      }
    }
  }
}

TEST_P(Ops, StoreQkvMatchesFloat64) {
  Random random(6);
  for (const QkvCase& c : {QkvCase{16, 1, 1, false, false},
                           {32, 2, 2, true, false},
                           {64, 2, 4, false, true},
                           {80, 1, 7, true, true},
                           {128, 2, 1, false, false}}) {
    check_store_qkv(GetParam(), c, random);
  }
}

TEST(Isa, NamesRoundTrip) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    EXPECT_EQ(parse_isa(isa_name(isa)), isa);
  }
  EXPECT_FALSE(parse_isa("neon").has_value());
  EXPECT_TRUE(isa_supported(best_isa()));
}

TEST(Isa, UnsupportedLimitsAreRefused) {
  KernelLimits limits{.shape = {1, 3, 64}, .heads = 4, .max_rows = 1, .max_context_tokens = 64};
  EXPECT_ANY_THROW(make_cpu_kernels(Isa::portable, 1, limits));
  limits.heads = 3;
  EXPECT_NO_THROW(make_cpu_kernels(Isa::portable, 1, limits));
  EXPECT_ANY_THROW(make_cpu_kernels(Isa::portable, 0, limits));
  limits.shape.head_dim = 24;
  EXPECT_ANY_THROW(make_cpu_kernels(Isa::portable, 1, limits));
}

}  // namespace
}  // namespace vericache::test
