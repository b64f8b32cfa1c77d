// The pages that a draft step reads and the bounds that they are chosen by, in plain loops. Keys and queries are small
// integers, so that no sum is rounded and ties are ties everywhere. Pure.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <vector>

#include "backend/kv_fixture.h"

namespace vericache::test {

// Rows of small integers (rows, dim).
inline std::vector<int> small_integers(int rows, int dim, int most, Random& random) {
  std::vector<int> out(static_cast<size_t>(rows) * static_cast<size_t>(dim));
  std::generate(out.begin(), out.end(), [&] { return random.between(-most, most); });
  return out;
}
// (rows, padded), as bf16.
inline std::vector<bf16> as_bf16(const std::vector<int>& values, int dim, int padded) {
  std::vector<bf16> out(values.size() / static_cast<size_t>(dim) * static_cast<size_t>(padded), bf16{0});
  for (size_t i = 0; i < values.size(); ++i) {
    out[i / static_cast<size_t>(dim) * static_cast<size_t>(padded) + i % static_cast<size_t>(dim)] =
        to_bf16(static_cast<float>(values[i]));
  }
  return out;
}

// Of keys (tokens, dim) that stand in pages and queries (heads, dim): what each page counts.
inline std::vector<int> page_scores(const std::vector<int>& keys, const std::vector<int>& q, int dim) {
  const int tokens = static_cast<int>(keys.size()) / dim;
  std::vector<int> scores;
  for (int page = 0; page < tokens; page += kPageTokens) {
    int sum = 0;
    for (size_t head = 0; head < q.size(); head += static_cast<size_t>(dim)) {
      int most = INT_MIN;
      for (int run = page; run < std::min(tokens, page + kPageTokens); run += kBoundTokens) {
        int bound = 0;
        for (int d = 0; d < dim; ++d) {
          int best = INT_MIN;
          for (int t = run; t < std::min(tokens, run + kBoundTokens); ++t) {
            best = std::max(best, q[head + static_cast<size_t>(d)] * keys[static_cast<size_t>(t * dim + d)]);
          }
          bound += best;
        }
        most = std::max(most, bound);
      }
      sum += most;
    }
    scores.push_back(sum);
  }
  return scores;
}

// The best, ascending; ties fall to the later page.
inline std::vector<int> best_pages(const std::vector<int>& scores, int count) {
  std::vector<int> order(scores.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int>(order.size() - 1 - i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

// The bounds of one page of keys (tokens, dim), as bits (kBoundRuns, 2, padded), compared as signed magnitudes.
inline std::vector<uint16_t> page_bounds(const std::vector<bf16>& keys, int dim, int padded) {
  const int tokens = static_cast<int>(keys.size()) / dim;
  const auto order = [](uint16_t bits) { return (bits & 0x8000) != 0 ? -1 - (bits & 0x7fff) : bits & 0x7fff; };
  std::vector<uint16_t> out(static_cast<size_t>(kBoundRuns * 2 * padded), 0);
  for (int run = 0; run < kBoundRuns; ++run) {
    const int first = std::min(run, (tokens - 1) / kBoundTokens) * kBoundTokens;
    for (int d = 0; d < dim; ++d) {
      uint16_t low = keys[static_cast<size_t>(first * dim + d)].bits;
      uint16_t high = low;
      for (int t = first; t < std::min(tokens, first + kBoundTokens); ++t) {
        const uint16_t bits = keys[static_cast<size_t>(t * dim + d)].bits;
        low = order(bits) < order(low) ? bits : low;
        high = order(bits) > order(high) ? bits : high;
      }
      out[static_cast<size_t>(2 * run * padded + d)] = low;
      out[static_cast<size_t>((2 * run + 1) * padded + d)] = high;
    }
  }
  return out;
}

}  // namespace vericache::test
