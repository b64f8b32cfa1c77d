// Products of few rows against float64, every row count, all ends; what lies behind the outputs stays as it was.
#include "backend/cuda/few_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backend/cuda/device_array.h"

namespace vericache::cuda::test {
namespace {

struct Shape {
  int out;
  int in;
};
// One step of K a warp, fewer than are under way at once, more, and no multiple of them.
const Shape kShapes[] = {{16, 256}, {48, 768}, {64, 2048}, {4096, 1792}};

class FewRows : public testing::TestWithParam<Shape> {
 protected:
  size_t out() const { return static_cast<size_t>(GetParam().out); }
  size_t in() const { return static_cast<size_t>(GetParam().in); }
  std::vector<bf16> random(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<bf16> values(count);
    for (bf16& value : values) {
      value = to_bf16(normal(engine_));
    }
    return values;
  }
  double dot(const std::vector<bf16>& weight, size_t o, const std::vector<bf16>& x, size_t row) const {
    double sum = 0;
    for (size_t k = 0; k < in(); ++k) {
      sum += static_cast<double>(to_float(weight[o * in() + k])) * static_cast<double>(to_float(x[row * in() + k]));
    }
    return sum;
  }
  // The sum of as many products of this size, each rounded once to float.
  double tolerance() const { return 4e-6 * static_cast<double>(in()); }

  std::mt19937_64 engine_{17};
};

TEST_P(FewRows, AreProducts) {
  const std::vector<bf16> weight = random(out() * in());
  const DeviceArray<bf16> device_weight(weight);
  const PackedMatrix matrix{GetParam().out, GetParam().in, device_weight.data()};
  for (const int rows : {1, 2, 4, 7, 8, 9, 16}) {
    ASSERT_TRUE(few_rows_fit(matrix, rows));
    const auto count = static_cast<size_t>(rows);
    const std::vector<bf16> x = random(count * in());
    const DeviceArray<bf16> device_x(x);
    for (const Epilogue epilogue : {Epilogue::store, Epilogue::add}) {
      std::vector<float> before((count + 1) * out(), epilogue == Epilogue::add ? 3.0f : std::nanf(""));
      DeviceArray<float> y(before);
      few_rows_product(matrix, device_x.data(), rows, y.data(), epilogue, nullptr);
      finish();
      const std::vector<float> got = y.read();
      for (size_t row = 0; row < count; ++row) {
        for (size_t o = 0; o < out(); o += out() > 64 ? 37 : 1) {
          const double expected = dot(weight, o, x, row) + (epilogue == Epilogue::add ? 3.0 : 0.0);
          ASSERT_NEAR(got[row * out() + o], expected, tolerance()) << rows << " rows, row " << row << ", output " << o;
        }
      }
      for (size_t i = count * out(); i < got.size(); ++i) {
        ASSERT_EQ(std::isnan(got[i]), epilogue == Epilogue::store) << "behind the last row";
      }
    }
  }
  EXPECT_FALSE(few_rows_fit(matrix, 17));
  EXPECT_FALSE(few_rows_fit({GetParam().out, GetParam().in - 32, nullptr}, 1));
  EXPECT_FALSE(few_rows_fit({GetParam().out + 8, GetParam().in, nullptr}, 1));
}

TEST_P(FewRows, AreGated) {
  const std::vector<bf16> weight = random(out() * in());
  const DeviceArray<bf16> device_weight(weight);
  const PackedMatrix matrix{GetParam().out, GetParam().in, device_weight.data()};
  const size_t dim = out() / 2;
  for (const int rows : {1, 5, 8, 13, 16}) {
    const auto count = static_cast<size_t>(rows);
    const std::vector<bf16> x = random(count * in());
    const DeviceArray<bf16> device_x(x);
    DeviceArray<bf16> activated((count + 1) * dim);
    few_rows_gate(matrix, device_x.data(), rows, activated.data(), nullptr);
    finish();
    const std::vector<bf16> got = activated.read();
    for (size_t row = 0; row < count; ++row) {
      for (size_t o = 0; o < dim; o += out() > 64 ? 37 : 1) {
        const double gate = dot(weight, o, x, row);
        const double expected = gate / (1 + std::exp(-gate)) * dot(weight, dim + o, x, row);
        ASSERT_NEAR(to_float(got[row * dim + o]), expected, std::abs(expected) / 128 + 60 * tolerance())
            << rows << " rows, row " << row << ", output " << o;
      }
    }
    for (size_t i = count * dim; i < got.size(); ++i) {
      ASSERT_TRUE(std::isnan(to_float(got[i]))) << "behind the last row";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, FewRows, testing::ValuesIn(kShapes));

}  // namespace
}  // namespace vericache::cuda::test
