// Tests of choose: the CPU's choose() is the oracle; a row's token and hash may not depend on the rows beside it, which
// decide how many thread blocks share a row.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <span>

#include "backend/cuda/checksum.h"
#include "backend/cuda/device_array.h"
#include "backend/cuda/thinned.h"
#include "backend/philox.h"
#include "backend/sampling.h"

namespace vericache::cuda::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

struct Request {
  Sampling sampling;
  int position = 0;
};
struct Choice {
  TokenId token = 0;
  uint64_t hash = 0;
  float margin = 0;
  friend bool operator==(const Choice&, const Choice&) = default;
};

void run_choose(const DeviceArray<float>& logits, int vocabulary, const std::vector<LogitRow>& rows) {
  const DeviceArray<LogitRow> device_rows(rows);
  StagedPass pass;
  pass.logit_rows = device_rows.data();
  pass.logit_count = static_cast<int>(rows.size());
  choose(logits.data(), pass, vocabulary, nullptr);
  finish();
}

// Twice: with hashes, then with margins. logits (requests, vocabulary).
std::vector<Choice> choose_on_device(const DeviceArray<float>& logits, int vocabulary,
                                     const std::vector<Request>& requests) {
  const size_t count = requests.size();
  PinnedArray<TokenId> tokens(count);
  PinnedArray<uint64_t> hashes(count);
  PinnedArray<float> margins(count);
  std::vector<LogitRow> rows(count);
  for (size_t i = 0; i < count; ++i) {
    rows[i] = {.row = static_cast<int>(i),
               .position = requests[i].position,
               .sampling = requests[i].sampling,
               .token = &tokens[i],
               .hash = &hashes[i]};
  }
  run_choose(logits, vocabulary, rows);
  std::vector<Choice> out(count);
  for (size_t i = 0; i < count; ++i) {
    out[i] = {tokens[i], hashes[i]};
    rows[i].hash = nullptr;
    rows[i].margin = &margins[i];
  }
  run_choose(logits, vocabulary, rows);
  for (size_t i = 0; i < count; ++i) {
    EXPECT_EQ(tokens[i], out[i].token) << "asking for the margin changes a choice";
    out[i].margin = margins[i];
  }
  return out;
}

class Cases {
 public:
  explicit Cases(uint64_t seed) : random_(seed) {}

  int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }
  // Much faster than the library's, and as good here: a sum of uniforms has a bell, too.
  float bell() {
    const uint64_t bits = random_();
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
      sum += static_cast<int>(bits >> (16 * i) & 0xffff) - 0x8000;
    }
    return static_cast<float>(sum) * (1.0f / 37837);
  }

  void fill(std::span<float> row) {
    const int kind = below(8);
    const auto spread = static_cast<float>(std::exp(std::log(0.01) + uniform() * std::log(4000)));
    for (float& x : row) {
      x = kind == 0 ? static_cast<float>(below(4)) : kind == 1 ? std::round(bell() * spread) : bell() * spread;
      if (kind == 2 && below(8) == 0) {
        const float odd[] = {kNan, -kInfinity, -3e38f, -0.0f};
        x = odd[below(4)];
      }
    }
    const auto any = [&]() -> float& { return row[static_cast<size_t>(below(static_cast<int>(row.size())))]; };
    if (kind == 3) {
      std::sort(row.begin(), row.end());
    } else if (kind == 4) {  // as a language model: most of the mass on few tokens
      for (int i = 0; i < 20; ++i) {
        any() += 4 * spread;
      }
    } else if (kind == 5) {
      std::fill(row.begin(), row.end(), 1.5f);
    } else if (kind == 6 && below(4) == 0) {
      std::fill(row.begin(), row.end(), below(2) ? kNan : -kInfinity);
    } else if (kind == 2 && below(4) == 0) {
      any() = kInfinity;
      any() = kInfinity;
    }
  }

  Request request(int vocabulary) {
    Sampling s;
    const float temperatures[] = {0.f, 1e-40f, 1e-30f, 0.01f, 0.7f, 1.f, 1.f, 1.5f, 40.f, 1e30f};
    s.temperature = temperatures[below(10)];
    s.top_k = below(2) ? 0 : 1 + below(below(2) ? 50 : vocabulary + 2);
    s.top_p = below(2) ? 1.f : std::max(1e-6f, static_cast<float>(1 - uniform()));
    s.min_p = below(2) ? 0.f : static_cast<float>(below(4) ? uniform() * 0.2 : uniform());
    s.seed = random_();
    return {s, below(std::numeric_limits<int>::max())};
  }

 private:
  std::mt19937_64 random_;
};

double value_of(std::span<const float> row, const Request& request, TokenId token) {
  const auto id = static_cast<uint32_t>(token);
  const uint64_t seed = request.sampling.seed;
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const uint32_t word = philox4x32({id / 4, static_cast<uint32_t>(request.position), 0, 0}, key)[id % 4];
  return static_cast<double>(row[id]) / static_cast<double>(request.sampling.temperature) -
         std::log(-std::log((word + 0.5) * 0x1p-32));
}

// The logarithms of two libraries may order two tokens apart that differ in the last bits only.
bool near_tie(std::span<const float> row, const Request& request, TokenId a, TokenId b) {
  if (a < 0 || static_cast<size_t>(a) >= row.size() || request.sampling.temperature == 0) {
    return false;
  }
  const double left = value_of(row, request, a);
  const double right = value_of(row, request, b);
  return std::abs(left - right) < 1e-9 * std::max({1.0, std::abs(left), std::abs(right)});
}

// Rows and requests of `seed` in one pass, against the CPU.
void expect_as_on_cpu(int vocabulary, int cases_in_full, uint64_t seed) {
  if (left_out()) {
    return;
  }
  const int count = thinned(cases_in_full);
  Cases cases(seed);
  const auto width = static_cast<size_t>(vocabulary);
  std::vector<float> logits(width * static_cast<size_t>(count));
  std::vector<Request> requests;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    cases.fill(std::span(logits).subspan(i * width, width));
    requests.push_back(cases.request(vocabulary));
  }
  const std::vector<Choice> choices = choose_on_device(DeviceArray<float>(logits), vocabulary, requests);
  int ties = 0;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    const std::span<const float> row(logits.data() + i * width, width);
    const Request& r = requests[i];
    float margin = 0;
    const TokenId expected = vericache::choose(row, r.sampling, r.position, &margin);
    if (choices[i].token == expected) {
      const double rounding = 1e-4 + 1e-6 * std::abs(static_cast<double>(row[static_cast<size_t>(expected)]));
      ASSERT_NEAR(choices[i].margin, margin, std::isnan(rounding) ? 1e-4 : rounding)
          << "row " << i << " of " << vocabulary << " tokens, temperature " << r.sampling.temperature << " top_k "
          << r.sampling.top_k << " top_p " << r.sampling.top_p << " min_p " << r.sampling.min_p;
    } else {
      ASSERT_TRUE(near_tie(row, r, choices[i].token, expected))
          << "row " << i << " of " << vocabulary << " tokens, temperature " << r.sampling.temperature << " top_k "
          << r.sampling.top_k << " top_p " << r.sampling.top_p << " min_p " << r.sampling.min_p << ": "
          << choices[i].token << ", not " << expected;
      ++ties;
    }
    ASSERT_EQ(choices[i].hash, checksum_of(row.data(), row.size_bytes()));
  }
  EXPECT_LE(ties, 2);
}

TEST(CudaSampling, TinyVocabularies) {
  for (int vocabulary = 1; vocabulary < 70; ++vocabulary) {
    expect_as_on_cpu(vocabulary, 24, static_cast<uint64_t>(vocabulary));
  }
}
TEST(CudaSampling, SmallVocabularies) {
  for (const int vocabulary : {255, 1000, 4096, 4099}) {
    expect_as_on_cpu(vocabulary, 300, static_cast<uint64_t>(vocabulary));
  }
}
TEST(CudaSampling, MiddleVocabularies) {
  for (const int vocabulary : {8192, 16385, 32003, 65538}) {
    expect_as_on_cpu(vocabulary, 60, static_cast<uint64_t>(vocabulary));  // rows of two blocks, where long enough
    expect_as_on_cpu(vocabulary, 9, static_cast<uint64_t>(vocabulary) + 1);
  }
}
TEST(CudaSampling, LargeVocabularies) {
  for (const int vocabulary : {100'352, 128'256, 151'937, 152'064}) {
    expect_as_on_cpu(vocabulary, 16, static_cast<uint64_t>(vocabulary));  // eight blocks a row
    expect_as_on_cpu(vocabulary, 80, static_cast<uint64_t>(vocabulary) + 1);
  }
}

TEST(CudaSampling, OddLogits) {
  const std::vector<std::vector<float>> rows = {
      std::vector<float>(5, kNan),      std::vector<float>(5, -kInfinity),
      {kNan, -kInfinity, -5, kNan, -6}, {1e38f, kNan, kInfinity, kInfinity, 3},
      {-3e38f, 3e38f, -3e38f, 0, 0},    {-0.f, 0.f, -1, -0.f, kNan}};
  const TokenId expected[] = {0, 0, 2, 2, 1, 0};
  std::vector<float> logits;
  std::vector<Request> requests;
  for (const std::vector<float>& row : rows) {
    logits.insert(logits.end(), row.begin(), row.end());
    requests.push_back({{.temperature = 0, .top_p = 0.9f}, 3});
  }
  const DeviceArray<float> device(logits);
  const auto greedy = choose_on_device(device, 5, requests);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(greedy[i].token, expected[i]) << i;
    requests[i].sampling.temperature = 1;
  }
  const auto sampled = choose_on_device(device, 5, requests);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(sampled[i].token, vericache::choose(rows[i], requests[i].sampling, 3)) << i;
  }
}

// The nucleus and the k best may end among equals: the lower ids stay. With few tokens each end shows within the draws.
TEST(CudaSampling, FiltersEndAmongEquals) {
  const std::vector<float> rows[] = {std::vector<float>(10, 1.f), {2, 1, 1, 2, 1, 1, 1, 0, 1, 0}};
  for (const std::vector<float>& row : rows) {
    std::vector<float> logits;
    std::vector<Request> requests;
    for (int top_k = 0; top_k <= 10; ++top_k) {
      for (int tenths = 1; tenths <= 10; ++tenths) {
        for (int position = 0; position < thinned(60); ++position) {
          logits.insert(logits.end(), row.begin(), row.end());
          const float top_p = tenths == 10 ? 1.f : static_cast<float>(tenths) * 0.1f;
          requests.push_back({{.temperature = 1, .top_k = top_k, .top_p = top_p}, position});
        }
      }
    }
    const auto choices = choose_on_device(DeviceArray<float>(logits), static_cast<int>(row.size()), requests);
    for (size_t i = 0; i < choices.size(); ++i) {
      const Request& r = requests[i];
      ASSERT_EQ(choices[i].token, vericache::choose(row, r.sampling, r.position))
          << "top_k " << r.sampling.top_k << " top_p " << r.sampling.top_p << " position " << r.position;
    }
  }
}
TEST(CudaSampling, EqualTokensSurviveInOrderOfTheirIds) {
  constexpr int kVocabulary = 70'000;
  Cases cases(8);
  std::vector<float> row(kVocabulary);
  for (float& x : row) {
    x = static_cast<float>(cases.below(3));
  }
  for (const int count : {2, thinned(80)}) {
    std::vector<float> logits;
    std::vector<Request> requests;
    for (int i = 0; i < count; ++i) {
      logits.insert(logits.end(), row.begin(), row.end());
      Sampling s{.temperature = 100, .top_k = 1 + cases.below(kVocabulary), .seed = static_cast<uint64_t>(i)};
      s.top_p = i % 2 ? static_cast<float>(1 - cases.uniform()) : 1.f;
      requests.push_back({s, i});
    }
    const auto choices = choose_on_device(DeviceArray<float>(logits), kVocabulary, requests);
    for (size_t i = 0; i < choices.size(); ++i) {
      EXPECT_EQ(choices[i].token, vericache::choose(row, requests[i].sampling, requests[i].position)) << i;
    }
  }
}

// Alone a row is shared by eight blocks, among 600 it has one.
TEST(CudaSampling, ARowDoesNotDependOnItsCompany) {
  for (const int vocabulary : {32'003, 152'064}) {
    constexpr int kDistinct = 12;
    constexpr int kCompany = 600;
    Cases cases(5);
    const auto width = static_cast<size_t>(vocabulary);
    std::vector<float> logits(width * kDistinct);
    std::vector<Request> distinct;
    std::vector<Choice> alone;
    for (size_t i = 0; i < kDistinct; ++i) {
      const auto row = std::span(logits).subspan(i * width, width);
      cases.fill(row);
      distinct.push_back(cases.request(vocabulary));
      if (i % 3 != 0) {
        distinct.back().sampling.temperature = 0.9f;
      }
      const DeviceArray<float> device(std::vector<float>(row.begin(), row.end()));
      alone.push_back(choose_on_device(device, vocabulary, {distinct.back()})[0]);
    }
    std::vector<float> company;
    company.reserve(width * kCompany);
    std::vector<Request> requests;
    std::vector<size_t> which;
    for (int i = 0; i < kCompany; ++i) {
      which.push_back(static_cast<size_t>(cases.below(kDistinct)));
      const auto row = logits.begin() + static_cast<ptrdiff_t>(which.back() * width);
      company.insert(company.end(), row, row + vocabulary);
      requests.push_back(distinct[which.back()]);
    }
    const auto choices = choose_on_device(DeviceArray<float>(company), vocabulary, requests);
    for (size_t i = 0; i < choices.size(); ++i) {
      EXPECT_EQ(choices[i], alone[which[i]]) << "row " << i << " of " << vocabulary;
    }
  }
}

TEST(CudaSampling, EveryBitOfTheLogitsIsInTheHash) {
  constexpr int kVocabulary = 1003;
  constexpr int kFlips = 400;
  Cases cases(6);
  std::vector<float> row(kVocabulary);
  cases.fill(row);
  std::vector<float> logits = row;
  for (int i = 0; i < kFlips; ++i) {
    std::vector<float> flipped = row;
    float& x = flipped[i < 32 ? kVocabulary - 1 : static_cast<size_t>(cases.below(kVocabulary))];
    x = std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ 1u << (i % 32));
    logits.insert(logits.end(), flipped.begin(), flipped.end());
  }
  const auto choices = choose_on_device(DeviceArray<float>(logits), kVocabulary, std::vector<Request>(kFlips + 1));
  for (size_t i = 1; i < choices.size(); ++i) {
    EXPECT_NE(choices[i].hash, choices[0].hash) << i;
  }
}

TEST(CudaSampling, AHashNobodyWantsIsNotWritten) {
  PinnedArray<TokenId> token(1);
  const DeviceArray<float> logits(std::vector<float>{1, 3, 2, 3, 3});
  const DeviceArray<LogitRow> rows(std::vector<LogitRow>{{.token = token.data()}});
  StagedPass pass;
  pass.logit_rows = rows.data();
  pass.logit_count = 1;
  choose(logits.data(), pass, 5, nullptr);
  finish();
  EXPECT_EQ(token[0], 1);
}

}  // namespace
}  // namespace vericache::cuda::test
