#include "backend/cpu/token_scores.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "base/check.h"

namespace vericache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTaskPages = 8;
constexpr int kChunkRows = 24;  // of queries at once: their products stay in L1

size_t at(int row, int columns) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns);
}
int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

const bf16* head_page(const LayerKv& kv, int head, int page) {
  const int past_pages = kv.tail_position / kPageTokens;
  return reinterpret_cast<const bf16*>(page < past_pages ? kv.past.head_page(head, page)
                                                         : kv.tail.head_page(head, page - past_pages));
}

// sums[t] = the products of token t's key with `with`, or with itself where that is null.
void key_products(const bf16* keys, int key_dim, const float* with, float* sums) {
  for (int panel = 0; panel < kPageTokens / kPanel; ++panel, sums += kPanel) {
    std::fill_n(sums, kPanel, 0.0f);
    for (int d = 0; d < key_dim; d += 2, keys += 2 * kPanel) {
      for (int lane = 0; lane < kPanel; ++lane) {
        const float first = to_float(keys[2 * lane]);
        const float second = to_float(keys[2 * lane + 1]);
        sums[lane] += with == nullptr ? first * first + second * second : first * with[d] + second * with[d + 1];
      }
    }
  }
}

// sum[d] += the keys of the first `tokens` tokens, each times its factor.
void add_keys(const bf16* keys, int key_dim, const float* factors, int tokens, float* sum) {
  for (int panel = 0; panel * kPanel < tokens; ++panel, factors += kPanel) {
    const int lanes = std::min(kPanel, tokens - panel * kPanel);
    for (int d = 0; d < key_dim; d += 2, keys += 2 * kPanel) {
      for (int lane = 0; lane < lanes; ++lane) {
        sum[d] += to_float(keys[2 * lane]) * factors[lane];
        sum[d + 1] += to_float(keys[2 * lane + 1]) * factors[lane];
      }
    }
  }
}

// One over the length of a vector; a vector without length has no direction.
float inverse_length(float square) {
  return square > 0 ? 1 / std::sqrt(square) : 0;
}

void sum_directions(const KeyScoreArgs& args, int head, int piece, float* sum) {
  const int key_dim = args.shape.key_dim();
  std::fill_n(sum, key_dim, 0.0f);
  const int last = std::min(args.tokens, (piece + 1) * kKeyPieceTokens);
  for (int token = piece * kKeyPieceTokens; token < last; token += kPageTokens) {
    const bf16* keys = head_page(args.kv, head, token / kPageTokens);
    float factors[kPageTokens];
    key_products(keys, key_dim, nullptr, factors);
    std::transform(factors, factors + kPageTokens, factors, inverse_length);
    add_keys(keys, key_dim, factors, std::min(kPageTokens, last - token), sum);
  }
}

// What the queries of an expectation are turned by: undo the position of a row, then the mean rotation of the future.
class Turn {
 public:
  explicit Turn(const ExpectedArgs& args) : args_(args), half_(args.shape.head_dim / 2) {
    const int first = std::min(args.from, args.rope.positions - 1);
    const int last = std::clamp(args.from + args.future, first + 1, args.rope.positions);
    for (int i = 0; i < half_; ++i) {
      float cos = 0;
      float sin = 0;
      for (int position = first; position < last; ++position) {
        cos += args.rope.cos[at(position, half_) + static_cast<size_t>(i)];
        sin += args.rope.sin[at(position, half_) + static_cast<size_t>(i)];
      }
      cos_[i] = cos / static_cast<float>(last - first);
      sin_[i] = sin / static_cast<float>(last - first);
    }
  }

  // Pair i of a row's query (head_dim) -> first and second of its pair.
  void pair(const bf16* q, int position, int i, float& first, float& second) const {
    const float cos = args_.rope.cos[at(position, half_) + static_cast<size_t>(i)];
    const float sin = args_.rope.sin[at(position, half_) + static_cast<size_t>(i)];
    const float square = cos * cos + sin * sin;  // of Yarn's temperature, else 1
    const float a = to_float(q[i]);
    const float b = to_float(q[i + half_]);
    const float x = (a * cos + b * sin) / square;
    const float y = (b * cos - a * sin) / square;
    first = x * cos_[i] - y * sin_[i];
    second = y * cos_[i] + x * sin_[i];
  }

 private:
  const ExpectedArgs& args_;
  int half_;
  float cos_[kMaxHeadDim / 2];
  float sin_[kMaxHeadDim / 2];
};

// The mean of a query head's turned rows, then each row without it, then zeros: out (expected_rows, key_dim).
void turn_queries(const ExpectedArgs& args, const Turn& turn, int head, bf16* out) {
  const int key_dim = args.shape.key_dim();
  const int half = args.shape.head_dim / 2;
  std::fill_n(out, at(expected_rows(args.rows), key_dim), bf16{0});
  for (int i = 0; i < half; ++i) {
    const auto row_pair = [&](int row, float& first, float& second) {
      const int position = args.position + row;
      const int slot = (position - args.queries.origin) % args.queries.capacity;
      turn.pair(args.queries.q + at(slot * args.heads + head, key_dim), position, i, first, second);
    };
    float first_mean = 0;
    float second_mean = 0;
    float first = 0;
    float second = 0;
    for (int row = 0; row < args.rows; ++row) {
      row_pair(row, first, second);
      first_mean += first;
      second_mean += second;
    }
    first_mean /= static_cast<float>(args.rows);
    second_mean /= static_cast<float>(args.rows);
    out[i] = to_bf16(first_mean);
    out[i + half] = to_bf16(second_mean);
    for (int row = 0; row < args.rows; ++row) {
      row_pair(row, first, second);
      bf16* centred = out + at(1 + row, key_dim);
      centred[i] = to_bf16(first - first_mean);
      centred[i + half] = to_bf16(second - second_mean);
    }
  }
}

// exponents[t] of the page's first `held` tokens.
void page_exponents(const ExpectedArgs& args, PanelProduct product, const bf16* queries, const bf16* keys, int held,
                    float* exponents) {
  const int key_dim = args.shape.key_dim();
  float products[kChunkRows * kPageTokens];
  float squares[kPageTokens] = {};
  float linear[kPageTokens] = {};
  for (int first = 0; first < 1 + args.rows; first += kChunkRows) {
    const int rows = std::min(kChunkRows, 1 + args.rows - first);
    product(queries + at(first, key_dim), static_cast<size_t>(key_dim), rows, keys, at(key_dim, kPanel), key_dim / 2,
            kPageTokens / kPanel, products, kPageTokens, false, nullptr);
    for (int row = 0; row < rows; ++row) {
      for (int t = 0; t < kPageTokens; ++t) {
        const float x = products[at(row, kPageTokens) + static_cast<size_t>(t)] * args.scale;
        (first + row == 0 ? linear : squares)[t] += first + row == 0 ? x : x * x;
      }
    }
  }
  for (int t = 0; t < held; ++t) {
    exponents[t] = linear[t] + squares[t] / static_cast<float>(2 * args.rows);
  }
}

// scores (+)= softmax of the exponents of [sinks, tokens) / group.
void add_softmax(const float* exponents, int sinks, int tokens, int group, bool add, float* scores) {
  float top = -kInfinity;
  for (int t = sinks; t < tokens; ++t) {
    top = std::max(top, exponents[t]);
  }
  float sum = 0;
  for (int t = sinks; t < tokens; ++t) {
    sum += std::exp(exponents[t] - top);
  }
  for (int t = sinks; t < tokens; ++t) {
    const float share = std::exp(exponents[t] - top) / (sum * static_cast<float>(group));
    scores[t] = add ? scores[t] + share : share;
  }
}

void multiply_by_value_lengths(const bf16* values, int head_dim, int held, float* scores) {
  for (int t = 0; t < held; ++t) {
    float square = 0;
    for (int d = 0; d < head_dim; ++d) {
      const float x = to_float(values[value_index(t, d)]);
      square += x * x;
    }
    scores[t] *= std::sqrt(square);
  }
}

}  // namespace

void TokenScores::keys(const KeyScoreArgs& args) {
  const FlushDenormals flush;
  const int heads = args.shape.kv_heads;
  const int key_dim = args.shape.key_dim();
  const bool beside_mean = args.measure == KeyMeasure::difference;
  const int pieces = ceil_div(args.tokens, kKeyPieceTokens);
  if (beside_mean) {
    pool_.parallel_for(heads * pieces,
                       [&](int i) { sum_directions(args, i / pieces, i % pieces, args.scratch + at(i, key_dim)); });
    pool_.parallel_for(heads, [&](int head) {
      float* sum = args.scratch + at(head * pieces, key_dim);
      for (int piece = 1; piece < pieces; ++piece) {
        std::transform(sum, sum + key_dim, sum + at(piece, key_dim), sum, std::plus<>());
      }
      float square = 0;
      for (int d = 0; d < key_dim; ++d) {
        square += sum[d] * sum[d];
      }
      const float factor = inverse_length(square);
      std::transform(sum, sum + key_dim, sum, [&](float x) { return x * factor; });
    });
  }
  const int pages = ceil_div(args.tokens, kPageTokens);
  const int tasks = ceil_div(pages, kTaskPages);
  pool_.parallel_for(heads * tasks, [&](int i) {
    const int head = i / tasks;
    const int last = std::min(pages, (i % tasks + 1) * kTaskPages);
    for (int page = i % tasks * kTaskPages; page < last; ++page) {
      const bf16* keys = head_page(args.kv, head, page);
      float squares[kPageTokens];
      float products[kPageTokens];
      key_products(keys, key_dim, nullptr, squares);
      if (beside_mean) {
        key_products(keys, key_dim, args.scratch + at(head * pieces, key_dim), products);
      }
      float* scores = args.scores + at(head, args.tokens) + at(page, kPageTokens);
      for (int t = 0; t < std::min(kPageTokens, args.tokens - page * kPageTokens); ++t) {
        scores[t] = beside_mean ? -products[t] * inverse_length(squares[t]) : -std::sqrt(squares[t]);
      }
    }
  });
}

void TokenScores::expected(const ExpectedArgs& args) {
  const FlushDenormals flush;
  check(args.rows > 0 && args.rows <= args.queries.capacity && args.position >= args.queries.origin,
        "the queries that speak for those to come stand in their ring");
  check(args.position + args.rows <= args.rope.positions, "RoPE knows the positions of the queries");
  const int kv_heads = args.shape.kv_heads;
  const int group = args.heads / kv_heads;
  const int key_dim = args.shape.key_dim();
  const int sinks = std::min(args.sinks, args.tokens);
  const Turn turn(args);
  auto* queries = reinterpret_cast<bf16*>(args.scratch);
  auto* exponents = reinterpret_cast<float*>(args.scratch + expected_query_bytes(args.rows, args.shape));
  const int pages = ceil_div(args.tokens, kPageTokens);
  const int tasks = ceil_div(pages, kTaskPages);
  for (int member = 0; member < group; ++member) {
    pool_.parallel_for(kv_heads, [&](int head) {
      turn_queries(args, turn, head * group + member, queries + at(head * expected_rows(args.rows), key_dim));
    });
    pool_.parallel_for(kv_heads * tasks, [&](int i) {
      const int head = i / tasks;
      const int last = std::min(pages, (i % tasks + 1) * kTaskPages);
      for (int page = i % tasks * kTaskPages; page < last; ++page) {
        page_exponents(args, product_, queries + at(head * expected_rows(args.rows), key_dim),
                       head_page(args.kv, head, page), std::min(kPageTokens, args.tokens - page * kPageTokens),
                       exponents + at(head, args.tokens) + at(page, kPageTokens));
      }
    });
    pool_.parallel_for(kv_heads, [&](int head) {
      add_softmax(exponents + at(head, args.tokens), sinks, args.tokens, group, member > 0,
                  args.scores + at(head, args.tokens));
    });
  }
  pool_.parallel_for(kv_heads * pages, [&](int i) {
    const int head = i / pages;
    const int page = i % pages;
    float* scores = args.scores + at(head, args.tokens) + at(page, kPageTokens);
    multiply_by_value_lengths(head_page(args.kv, head, page) + at(kPageTokens, key_dim), args.shape.head_dim,
                              std::min(kPageTokens, args.tokens - page * kPageTokens), scores);
    std::fill_n(scores, std::clamp(sinks - page * kPageTokens, 0, kPageTokens), kInfinity);
  });
}

}  // namespace vericache
