// The rotation is orthogonal and its own inverse, leaves products as they are, and spreads an outlier over its block.
#include "backend/rotation.h"

#include <gtest/gtest.h>

#include <cmath>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

TEST(Rotation, IsTheHadamardMatrixOfEachBlock) {
  Random random(90);
  for (const int head_dim : {16, 32, 48, 64, 80, 96, 128, 256}) {
    const int block = rotation_block(head_dim);
    EXPECT_EQ(head_dim % block, 0);
    const std::vector<float> x = random.floats(static_cast<size_t>(head_dim));
    std::vector<float> y = x;
    rotate(y.data(), head_dim);
    for (int i = 0; i < head_dim; ++i) {
      double expected = 0;
      for (int j = i / block * block; j < i / block * block + block; ++j) {
        const bool minus = __builtin_popcount(static_cast<unsigned>(i % block & j % block)) % 2 != 0;
        expected += (minus ? -1.0 : 1.0) * static_cast<double>(x[static_cast<size_t>(j)]);
      }
      ASSERT_NEAR(y[static_cast<size_t>(i)], expected / std::sqrt(block), 1e-5);
    }
    rotate(y.data(), head_dim);
    for (int i = 0; i < head_dim; ++i) {
      ASSERT_NEAR(y[static_cast<size_t>(i)], x[static_cast<size_t>(i)], 1e-5);
    }
  }
}

// A page whose channel 5 is 50 times the others: rotated, 4 bits say far more about a token's other channels.
TEST(Rotation, TakesOutliersFromTheOtherChannels) {
  Random random(91);
  const KvShape shape{1, 1, 64};
  const auto kernels =
      make_cpu_kernels(best_isa(), 1, {.shape = shape, .heads = 1, .max_rows = 1, .max_context_tokens = 64});
  Pages source(shape, {}, 1, random);
  for (int t = 0; t < kPageTokens; ++t) {
    const std::vector<bf16> k = random.bf16s(64);
    std::vector<bf16> v = random.bf16s(64);
    v[5] = to_bf16(random.normal(50.0f));
    source.write(0, t, k.data(), v.data());
  }
  const auto error = [&](const KvFormat& format) {
    Pages back(shape, {}, 1, random);
    std::vector<std::byte> packed(head_page_bytes(format, shape));
    kernels->quantize_head_page(source.head_page(0, 0), kPageTokens, shape, format, packed.data());
    kernels->dequantize_head_page(packed.data(), shape, format, back.head_page(0, 0));
    double sum = 0;
    for (int t = 0; t < kPageTokens; ++t) {
      for (int d = 0; d < 64; ++d) {
        sum += d == 5 ? 0 : std::pow(to_float(back.value(0, t, d)) - to_float(source.value(0, t, d)), 2);
      }
    }
    return std::sqrt(sum / (kPageTokens * 63));
  };
  EXPECT_LT(error({4, 4, KvCode::affine, true}), 0.6 * error({4, 4}));
}

}  // namespace
}  // namespace vericache::test
