// LDLQ of rotated keys: the matrix decomposes what the queries are like, codes are those of a plain loop, and queries
// see less of the error than they do of the nearest codes.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backend/rounding_case.h"

namespace vericache::test {
namespace {

class KeyRoundingOp : public testing::TestWithParam<Isa> {
 protected:
  static std::unique_ptr<Kernels> kernels(const KvShape& shape, int heads) {
    return make_cpu_kernels(GetParam(), 2,
                            {.shape = shape, .heads = heads, .max_rows = 64, .max_context_tokens = 10000});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, KeyRoundingOp, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

std::vector<bf16> room(const KvShape& shape) {
  return std::vector<bf16>(rounding_bytes(shape) / sizeof(bf16), to_bf16(7));
}
double at(const std::vector<bf16>& matrix, const KvShape& shape, int head, int i, int j) {
  return to_float(matrix[static_cast<size_t>((head * shape.head_dim + i) * shape.head_dim + j)]);
}

// The mean of q q^T over a head's rotated queries.
std::vector<double> moment(const RoundingCase& of, int kv_head) {
  const int dims = of.shape.head_dim;
  const int group = of.heads / of.shape.kv_heads;
  std::vector<double> sum(static_cast<size_t>(dims * dims));
  std::vector<float> q(static_cast<size_t>(dims));
  for (int i = 0; i < of.rows * group; ++i) {
    std::transform(of.query(i / group, kv_head * group + i % group),
                   of.query(i / group, kv_head * group + i % group) + dims, q.begin(), to_float);
    rotate(q.data(), dims);
    for (int a = 0; a < dims; ++a) {
      for (int b = 0; b < dims; ++b) {
        sum[static_cast<size_t>(a * dims + b)] += static_cast<double>(q[static_cast<size_t>(a)]) *
                                                  static_cast<double>(q[static_cast<size_t>(b)]) / (of.rows * group);
      }
    }
  }
  return sum;
}

TEST_P(KeyRoundingOp, TheMatrixDecomposesTheQueries) {
  Random random(120);
  for (const int head_dim : {16, 32, 64, 96, 128}) {
    const KvShape shape{1, 2, head_dim};
    const int group = random.between(1, 3);
    RoundingCase of(shape, 2 * group, random.between(head_dim, 2 * head_dim), random);
    std::vector<bf16> matrix = room(shape);
    kernels(shape, of.heads)->fit_rounding(of.args(matrix.data()));
    for (int head = 0; head < 2; ++head) {
      const std::vector<double> c = moment(of, head);
      double trace = 0;
      for (int i = 0; i < head_dim; ++i) {
        trace += c[static_cast<size_t>(i * head_dim + i)];
      }
      // x^T (C + damping) x = sum of d_i (L^T x)_i^2 for any x: the sums d_i follow from unit vectors, then others must
      // fit.
      const auto power = [&](const std::vector<double>& x) {
        double sum = 0;
        for (int i = 0; i < head_dim; ++i) {
          for (int j = 0; j < head_dim; ++j) {
            const double damping = i == j ? static_cast<double>(kRoundingDamping) * trace / head_dim : 0;
            sum += x[static_cast<size_t>(i)] * x[static_cast<size_t>(j)] *
                   (c[static_cast<size_t>(i * head_dim + j)] + damping);
          }
        }
        return sum;
      };
      const auto turned = [&](const std::vector<double>& x, int i) {
        double sum = x[static_cast<size_t>(i)];
        for (int j = i + 1; j < head_dim; ++j) {
          sum += at(matrix, shape, head, i, j) * x[static_cast<size_t>(j)];
        }
        return sum;
      };
      std::vector<double> d;
      for (int i = 0; i < head_dim; ++i) {
        std::vector<double> unit(static_cast<size_t>(head_dim));
        unit[static_cast<size_t>(i)] = 1;
        double rest = power(unit);
        for (int k = 0; k < i; ++k) {
          rest -= d[static_cast<size_t>(k)] * turned(unit, k) * turned(unit, k);
        }
        d.push_back(rest);
        ASSERT_GT(rest, 0);
        for (int j = 0; j <= i; ++j) {
          const double wanted = c[static_cast<size_t>(i * head_dim + j)];
          ASSERT_NEAR(at(matrix, shape, head, i, j), wanted, 4e-3 * (std::abs(wanted) + 1e-2 * trace / head_dim))
              << "more queries join what lies below the diagonal";
        }
      }
      for (int round = 0; round < 10; ++round) {
        std::vector<double> x;
        for (const float one : random.floats(static_cast<size_t>(head_dim))) {
          x.push_back(one);
        }
        double sum = 0;
        for (int i = 0; i < head_dim; ++i) {
          sum += d[static_cast<size_t>(i)] * turned(x, i) * turned(x, i);
        }
        ASSERT_NEAR(sum, power(x), 0.03 * power(x)) << head_dim << " dims";
      }
    }
  }
}

TEST_P(KeyRoundingOp, QueriesMayComeInParts) {
  Random random(121);
  const KvShape shape{1, 2, 64};
  RoundingCase of(shape, 4, 200, random);
  std::vector<bf16> whole = room(shape);
  std::vector<bf16> parts = room(shape);
  const auto k = kernels(shape, 4);
  k->fit_rounding(of.args(whole.data()));
  for (const auto& [first, rows] : {std::pair{0, 3}, {3, 97}, {100, 100}}) {
    RoundingArgs args = of.args(parts.data());
    args.position += first;
    args.rows = rows;
    args.known = first;
    k->fit_rounding(args);
  }
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    difference += std::pow(to_float(whole[i]) - to_float(parts[i]), 2);
    size += std::pow(to_float(whole[i]), 2);
  }
  EXPECT_LT(difference, 2e-4 * size);
}

TEST_P(KeyRoundingOp, QueriesThatAreNotFiniteChangeNothing) {
  Random random(122);
  const KvShape shape{1, 1, 32};
  const auto k = kernels(shape, 2);
  RoundingCase good(shape, 2, 40, random);
  RoundingCase bad = good;
  bad.queries[static_cast<size_t>(bad.place(3)) * 2 * 32 + 5] = to_bf16(std::numeric_limits<float>::quiet_NaN());
  std::vector<bf16> matrix = room(shape);
  k->fit_rounding(bad.args(matrix.data()));
  for (const bf16 x : matrix) {
    ASSERT_EQ(x.bits, 0) << "as if to the nearest";
  }
  k->fit_rounding(good.args(matrix.data()));
  const std::vector<bf16> before = matrix;
  RoundingArgs more = bad.args(matrix.data());
  more.known = 40;
  k->fit_rounding(more);
  EXPECT_EQ(std::memcmp(before.data(), matrix.data(), rounding_bytes(shape)), 0);
}

// A page of keys, rotated as it is stored.
std::vector<float> rotated_key(const Pages& pages, int head, int token, int dims) {
  std::vector<float> x;
  for (int d = 0; d < dims; ++d) {
    x.push_back(to_float(pages.key(head, token, d)));
  }
  rotate(x.data(), dims);
  for (float& one : x) {
    one = to_float(to_bf16(one));
  }
  return x;
}

TEST_P(KeyRoundingOp, CodesAreThoseOfAPlainLoopAndQueriesSeeLess) {
  Random random(123);
  for (const int bits : {2, 3, 4}) {
    for (const int head_dim : {32, 80, 128}) {
      const KvShape shape{1, 2, head_dim};
      const KvFormat format{bits, 4, KvCode::affine, true};
      KvFormat as_stored = format;
      as_stored.rotated = false;
      const auto k = kernels(shape, 4);
      RoundingCase of(shape, 4, 2 * head_dim, random);
      std::vector<bf16> matrix = room(shape);
      k->fit_rounding(of.args(matrix.data()));
      Pages source(shape, {}, 1, random, false);
      std::fill(source.tokens().begin(), source.tokens().end(), kPageTokens);
      for (int head = 0; head < 2; ++head) {
        for (int t = 0; t < kPageTokens; ++t) {
          source.write(head, t, random.bf16s(static_cast<size_t>(head_dim)).data(),
                       random.bf16s(static_cast<size_t>(head_dim)).data());
        }
      }
      const LayerKv full{source.view(), source.view(), kPageTokens};
      Pages nearest(shape, format, 1, random, false);
      Pages rounded(shape, format, 1, random, false);
      k->quantize({.shape = shape, .full = full, .first = 0, .count = 1, .out = nearest.view()});
      k->quantize(
          {.shape = shape, .full = full, .first = 0, .count = 1, .out = rounded.view(), .rounding = matrix.data()});
      int same = 0;
      for (int head = 0; head < 2; ++head) {
        Pages back(shape, {}, 1, random, false);
        k->dequantize_head_page(rounded.head_page(head, 0), shape, as_stored, back.head_page(head, 0));
        std::vector<float> low(static_cast<size_t>(head_dim), std::numeric_limits<float>::infinity());
        std::vector<float> high(low.size(), -std::numeric_limits<float>::infinity());
        for (int t = 0; t < kPageTokens; ++t) {
          const std::vector<float> x = rotated_key(source, head, t, head_dim);
          for (size_t d = 0; d < x.size(); ++d) {
            low[d] = std::min(low[d], x[d]);
            high[d] = std::max(high[d], x[d]);
          }
        }
        for (int t = 0; t < kPageTokens; ++t) {
          const std::vector<float> x = rotated_key(source, head, t, head_dim);
          std::vector<double> error(x.size());
          for (int d = head_dim - 1; d >= 0; --d) {
            const auto i = static_cast<size_t>(d);
            double wanted = x[i];
            for (int j = d + 1; j < head_dim; ++j) {
              wanted += at(matrix, shape, head, d, j) * error[static_cast<size_t>(j)];
            }
            const int most = (1 << bits) - 1;
            const double step = to_float(round_up_to_bf16((high[i] - low[i]) / static_cast<float>(most)));
            const double code = std::clamp(std::nearbyint((wanted - low[i]) / step), 0.0, static_cast<double>(most));
            const double value = low[i] + code * step;
            error[i] = x[i] - value;
            same += to_bf16(static_cast<float>(value)) == back.key(head, t, d) ? 1 : 0;
          }
        }
        const auto seen = [&](const Pages& pages) {
          Pages read(shape, {}, 1, random, false);
          k->dequantize_head_page(pages.head_page(head, 0), shape, format, read.head_page(head, 0));
          double sum = 0;
          for (int t = 0; t < kPageTokens; ++t) {
            sum +=
                of.seen(head, [&](int d) { return to_float(source.key(head, t, d)) - to_float(read.key(head, t, d)); });
          }
          return sum;
        };
        EXPECT_LT(seen(rounded), 0.8 * seen(nearest)) << bits << " bits, " << head_dim << " dims";
      }
      // A double may round a tie the other way, and what follows it.
      EXPECT_GE(same, 2 * kPageTokens * head_dim * 99 / 100) << bits << " bits, " << head_dim << " dims";
    }
  }
}

TEST_P(KeyRoundingOp, GatheredTokensAreRoundedAlike) {
  Random random(124);
  const KvShape shape{1, 1, 64};
  const KvFormat format{3, 3, KvCode::affine, true};
  const auto k = kernels(shape, 1);
  RoundingCase of(shape, 1, 128, random);
  std::vector<bf16> matrix = room(shape);
  k->fit_rounding(of.args(matrix.data()));
  Pages source(shape, {}, 1, random, false);
  std::fill(source.tokens().begin(), source.tokens().end(), kPageTokens);
  std::vector<int> chosen;
  for (int t = 0; t < kPageTokens; ++t) {
    source.write(0, t, random.bf16s(64).data(), random.bf16s(64).data());
    chosen.push_back(t);
  }
  const LayerKv full{source.view(), source.view(), kPageTokens};
  Pages whole(shape, format, 1, random, false);
  Pages gathered(shape, format, 1, random, false);
  k->quantize({.shape = shape, .full = full, .first = 0, .count = 1, .out = whole.view(), .rounding = matrix.data()});
  k->gather({.shape = shape,
             .full = full,
             .chosen = chosen.data(),
             .stride = kPageTokens,
             .count = kPageTokens,
             .out = gathered.view(),
             .rounding = matrix.data()});
  EXPECT_EQ(std::memcmp(whole.head_page(0, 0), gathered.head_page(0, 0), head_page_bytes(format, shape)), 0);
}

}  // namespace
}  // namespace vericache::test
