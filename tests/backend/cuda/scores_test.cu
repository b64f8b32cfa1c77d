// Tests of pool_mass, choose_best, mean_rows and count_rows: against the plainest way to say them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "backend/cuda/device_array.h"
#include "backend/cuda/thinned.h"

namespace vericache::cuda::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class Cases {
 public:
  explicit Cases(uint64_t seed) : random_(seed) {}
  int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(random_() >> 40) * 0x1p-24f; }

  std::vector<float> scores(size_t count) {
    std::vector<float> out(count);
    const int kind = below(7);
    for (float& x : out) {
      switch (kind) {
        case 0:
          x = uniform() - 0.5f;
          break;
        case 1:
          x = static_cast<float>(below(4)) - 1.5f;
          break;  // many ties
        case 2:
          x = 0.25f;
          break;  // nothing but ties
        case 3:
          x = below(3) ? 0.0f : -0.0f;
          break;  // zeros are equal
        case 4:
          x = std::ldexp(uniform(), -below(120));
          break;  // as masses are
        case 5:
          x = below(2) ? std::nanf("") : -kInfinity;
          break;  // equal, too
        default:
          x = below(5) ? uniform() : below(2) ? kInfinity : std::nanf("");
      }
    }
    if (kind == 4) {  // the window that is always kept
      std::fill(out.end() - std::min<ptrdiff_t>(32, static_cast<ptrdiff_t>(count)), out.end(), kInfinity);
    }
    return out;
  }

 private:
  std::mt19937_64 random_;
};

std::vector<int> best_of(const float* scores, int n, int count) {
  const auto value = [&](int i) { return std::isnan(scores[i]) ? -kInfinity : scores[i]; };
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return value(a) != value(b) ? value(a) > value(b) : a > b; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

// differ: each row has a count of its own, `count` at most.
void expect_best(int rows, int n, int count, int stride, Cases& cases, bool differ = false) {
  if (left_out()) {
    return;
  }
  std::vector<float> scores;
  for (int row = 0; row < rows; ++row) {
    const std::vector<float> fresh = cases.scores(static_cast<size_t>(n));
    scores.insert(scores.end(), fresh.begin(), fresh.end());
  }
  const DeviceArray<float> device(scores);
  const DeviceArray<int> chosen(static_cast<size_t>(rows) * static_cast<size_t>(stride));
  std::vector<int> counts(static_cast<size_t>(rows), count);
  for (int& one : counts) {
    one = differ ? cases.below(count + 1) : count;
  }
  const DeviceArray<int> device_counts(counts);
  choose_best({.scores = device.data(),
               .rows = rows,
               .n = n,
               .count = count,
               .counts = differ ? device_counts.data() : nullptr,
               .chosen = chosen.data(),
               .stride = stride},
              nullptr);
  finish();
  const std::vector<int> out = chosen.read();
  for (int row = 0; row < rows; ++row) {
    std::vector<int> expected =
        best_of(scores.data() + static_cast<ptrdiff_t>(row) * n, n, counts[static_cast<size_t>(row)]);
    expected.resize(static_cast<size_t>(stride), -1);  // beyond the count nothing is written
    const int* written = out.data() + static_cast<ptrdiff_t>(row) * stride;
    ASSERT_TRUE(std::equal(expected.begin(), expected.end(), written))
        << "row " << row << " of " << rows << ", " << count << " of " << n;
  }
}

TEST(CudaScores, ChooseBestOfFew) {
  Cases cases(1);
  for (int n = 1; n < 40; ++n) {
    for (int round = 0; round < 8; ++round) {
      const int count = cases.below(n + 1);
      expect_best(1 + cases.below(9), n, count, count + cases.below(5), cases);
    }
  }
}
TEST(CudaScores, ChooseBestOfMany) {
  Cases cases(2);
  for (const int n : {1000, 4096, 4099, 16'384, 32'768, 100'003}) {
    for (int round = 0; round < 10; ++round) {
      const int counts[] = {1, n - 1, n, n / 4, cases.below(n + 1)};
      const int count = counts[round % 5];
      expect_best(round < 5 ? 8 : 1 + cases.below(3), n, count, count + cases.below(70), cases);
    }
  }
}
TEST(CudaScores, ChooseBestOfAMillion) {
  Cases cases(3);
  for (int round = 0; round < 5; ++round) {
    expect_best(2, 1 << 20, cases.below(1 << 20), 1 << 20, cases);
  }
}
// So many rows that each has one block.
TEST(CudaScores, ChooseBestOfManyRows) {
  Cases cases(4);
  expect_best(200, 9001, 2000, 2000, cases);
}

TEST(CudaScores, ChooseBestOfRowsWithCountsOfTheirOwn) {
  Cases cases(6);
  for (const int n : {1, 30, 3000, 32'768}) {
    for (int round = 0; round < 6; ++round) {
      const int count = cases.below(n + 1);
      expect_best(1 + cases.below(9), n, count, count + cases.below(5), cases, true);
    }
  }
}

TEST(CudaScores, ChosenOfAllRowsAreCountedByRows) {
  Cases cases(7);
  for (int round = 0; round < thinned(20); ++round) {
    const int rows = 1 + cases.below(16);
    const int n = 1 + cases.below(round % 4 == 0 ? 40'000 : 100);
    const int count = cases.below(rows * n + 1);
    const std::vector<float> scores = cases.scores(static_cast<size_t>(rows) * static_cast<size_t>(n));
    const DeviceArray<float> device(scores);
    const DeviceArray<int> chosen(static_cast<size_t>(count) + 1);
    const PinnedArray<int> counts(static_cast<size_t>(rows) + 1);
    choose_best(
        {.scores = device.data(), .rows = 1, .n = rows * n, .count = count, .chosen = chosen.data(), .stride = count},
        nullptr);
    count_rows(chosen.data(), count, rows, n, counts.data(), nullptr);
    finish();
    std::vector<int> expected(static_cast<size_t>(rows));
    for (const int token : best_of(scores.data(), rows * n, count)) {
      ++expected[static_cast<size_t>(token / n)];
    }
    for (int row = 0; row < rows; ++row) {
      ASSERT_EQ(counts[static_cast<size_t>(row)], expected[static_cast<size_t>(row)]) << "row " << row;
    }
    ASSERT_EQ(counts[static_cast<size_t>(rows)], -1);
  }
}

TEST(CudaScores, MeanRowsAreAllTheSame) {
  Cases cases(8);
  for (const auto& [rows, n] : {std::pair{1, 5}, {3, 1}, {8, 9001}, {7, 256}}) {
    std::vector<float> values(static_cast<size_t>(rows) * static_cast<size_t>(n));
    for (float& x : values) {
      x = cases.uniform();
    }
    const DeviceArray<float> device(values);
    mean_rows(device.data(), rows, n, nullptr);
    finish();
    const std::vector<float> out = device.read();
    for (size_t token = 0; token < static_cast<size_t>(n); ++token) {
      double sum = 0;
      for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
        sum += static_cast<double>(values[row * static_cast<size_t>(n) + token]);
      }
      for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
        ASSERT_NEAR(out[row * static_cast<size_t>(n) + token], sum / rows, 1e-6);
      }
    }
  }
}

TEST(CudaScores, PoolMassIsTheMeanOfTheNeighbours) {
  Cases cases(5);
  for (int round = 0; round < 60; ++round) {
    const int rows = 1 + cases.below(8);
    const int n = round % 6 == 0 ? 4000 + cases.below(30'000) : 1 + cases.below(600);
    const int reach = cases.below(round % 3 == 0 ? 128 : 5);
    const int always = cases.below(round % 4 == 0 ? n + 20 : 40);
    std::vector<float> mass(static_cast<size_t>(rows) * static_cast<size_t>(n));
    for (float& x : mass) {
      x = std::ldexp(cases.uniform(), -cases.below(20));
    }
    const DeviceArray<float> device(mass);
    const DeviceArray<float> scores(mass.size() + 1);
    pool_mass(device.data(), rows, n, reach, always, scores.data(), nullptr);
    finish();
    const std::vector<float> out = scores.read();
    EXPECT_TRUE(std::isnan(out.back()));
    for (int row = 0; row < rows; ++row) {
      const float* of_row = mass.data() + static_cast<ptrdiff_t>(row) * n;
      for (int token = 0; token < n; ++token) {
        double sum = 0;
        for (int i = std::max(0, token - reach); i <= std::min(n - 1, token + reach); ++i) {
          sum += static_cast<double>(of_row[i]);
        }
        const double expected = sum / (2 * reach + 1);
        const float score = out[static_cast<size_t>(row) * static_cast<size_t>(n) + static_cast<size_t>(token)];
        if (token >= n - always) {
          ASSERT_EQ(score, kInfinity);
        } else {
          ASSERT_NEAR(score, expected, 3e-5 * expected) << token << " of " << n;
        }
      }
    }
  }
}

}  // namespace
}  // namespace vericache::cuda::test
