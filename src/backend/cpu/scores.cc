#include "backend/cpu/scores.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "base/check.h"

namespace vericache {
namespace {

constexpr int kPoolTokens = 4096;  // of one task
constexpr int kLanes = 16;

// Sums of neighbours in rising order, for kLanes tokens at once: their order is that of one token alone.
void pool_inner(const float* mass, int reach, float* sums) {
  for (int lane = 0; lane < kLanes; ++lane) {
    sums[lane] = mass[lane - reach];
  }
  for (int i = -reach + 1; i <= reach; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += mass[lane + i];
    }
  }
}

float pool_edge(const float* mass, int n, int reach, int token) {
  float sum = 0;
  for (int i = std::max(0, token - reach); i <= std::min(n - 1, token + reach); ++i) {
    sum += mass[i];
  }
  return sum;
}

void pool_tokens(const float* mass, int n, int reach, int first, int last, float* scores) {
  const float width = static_cast<float>(2 * reach + 1);
  for (int token = first; token < last;) {
    if (token >= reach && token + kLanes <= last && token + kLanes + reach <= n) {
      float sums[kLanes];
      pool_inner(mass + token, reach, sums);
      for (int lane = 0; lane < kLanes; ++lane) {
        scores[token + lane] = sums[lane] / width;
      }
      token += kLanes;
    } else {
      scores[token] = pool_edge(mass, n, reach, token) / width;
      ++token;
    }
  }
}

// Larger for a better score, and for a later token of equal ones. In integers: neither NaN nor the flushing of
// denormals can upset the order.
uint64_t rank_of(float score, int token) {
  uint32_t bits = std::bit_cast<uint32_t>(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    bits = 0xff800000u;
  } else if (bits == 0x80000000u) {
    bits = 0;
  }
  const uint32_t rising = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(rising) << 32 | static_cast<uint32_t>(token);
}

}  // namespace

void choose_best_of_row(const float* scores, int n, int count, uint64_t* keys, int* chosen) {
  if (count <= 0) {
    return;
  }
  for (int token = 0; token < n; ++token) {
    keys[token] = rank_of(scores[token], token);
  }
  std::nth_element(keys, keys + (count - 1), keys + n, std::greater<>());
  const uint64_t least = keys[count - 1];
  for (int token = 0; token < n; ++token) {
    if (rank_of(scores[token], token) >= least) {
      *chosen++ = token;
    }
  }
}

Scores::Scores(ThreadPool& pool, int max_tokens, int kv_heads)
    : pool_(pool),
      max_tokens_(static_cast<size_t>(max_tokens)),
      keys_(static_cast<size_t>(std::max(pool.threads(), kv_heads)) * max_tokens_) {}

void Scores::pool_mass(const float* mass, int rows, int n, int reach, int always, float* scores) {
  const FlushDenormals flush;
  const int tasks = (n + kPoolTokens - 1) / kPoolTokens;
  const int pooled = std::max(0, n - always);
  pool_.parallel_for(tasks * rows, [&](int i) {
    const ptrdiff_t row = static_cast<ptrdiff_t>(i / tasks) * n;
    const int first = i % tasks * kPoolTokens;
    const int last = std::min(n, first + kPoolTokens);
    const int border = std::clamp(pooled, first, last);
    pool_tokens(mass + row, n, reach, first, border, scores + row);
    std::fill(scores + row + border, scores + row + last, std::numeric_limits<float>::infinity());
  });
}

void Scores::choose_best(const BestArgs& args) {
  const size_t n = static_cast<size_t>(args.n);
  check(n <= max_tokens_ || (args.rows == 1 && n <= keys_.size()), "rows are as long as a context, or are all in one");
  check(args.count <= args.n && args.count <= args.stride, "the best are some of the tokens");
  pool_.parallel_for(args.rows, [&](int row) {
    const size_t place = args.rows == 1 ? 0 : static_cast<size_t>(ThreadPool::thread_index()) * max_tokens_;
    choose_best_of_row(args.scores + static_cast<ptrdiff_t>(row) * args.n, args.n,
                       args.counts == nullptr ? args.count : args.counts[row], keys_.data() + place,
                       args.chosen + static_cast<ptrdiff_t>(row) * args.stride);
  });
}

void Scores::mean_rows(float* values, int rows, int n) {
  const FlushDenormals flush;
  const int tasks = (n + kPoolTokens - 1) / kPoolTokens;
  pool_.parallel_for(tasks, [&](int task) {
    const int last = std::min(n, (task + 1) * kPoolTokens);
    for (int token = task * kPoolTokens; token < last; ++token) {
      float sum = 0;
      for (int row = 0; row < rows; ++row) {
        sum += values[static_cast<ptrdiff_t>(row) * n + token];
      }
      for (int row = 0; row < rows; ++row) {
        values[static_cast<ptrdiff_t>(row) * n + token] = sum / static_cast<float>(rows);
      }
    }
  });
}

void Scores::count_rows(const int* chosen, int count, int rows, int n, int* counts) {
  const int* first = chosen;
  for (int row = 0; row < rows; ++row) {
    const int* last = std::lower_bound(first, chosen + count, (row + 1) * n);
    counts[row] = static_cast<int>(last - first);
    first = last;
  }
}

}  // namespace vericache
