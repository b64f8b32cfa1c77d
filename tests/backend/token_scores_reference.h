// Scores of tokens by keys and by expected attention, in float64 and by whole matrices: what every backend is compared
// with. Plain values; each test owns its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/kernels.h"

namespace vericache::test {

// Keys and values of one layer: (kv_heads, tokens, head_dim).
struct TokenData {
  KvShape shape;
  int tokens = 0;
  std::vector<bf16> keys;
  std::vector<bf16> values;
  size_t index(int head, int token, int dim) const {
    return (static_cast<size_t>(head) * static_cast<size_t>(tokens) + static_cast<size_t>(token)) *
               static_cast<size_t>(shape.head_dim) +
           static_cast<size_t>(dim);
  }
  double key(int head, int token, int dim) const { return to_float(keys[index(head, token, dim)]); }
  double value(int head, int token, int dim) const { return to_float(values[index(head, token, dim)]); }
};

// Last queries in a ring, and the angles of RoPE. `temperature` multiplies cos and sin, as Yarn's does.
struct QueryData {
  int heads = 0;
  int capacity = 0;
  int rows = 0;
  int position = 0;
  int origin = 0;
  double temperature = 1;
  std::vector<bf16> q;              // (capacity, heads, key_dim)
  std::vector<double> frequencies;  // (head_dim / 2)
  double scale = 0;
  std::vector<float> table(int positions, double (*of)(double)) const {
    std::vector<float> out;
    for (int position_of = 0; position_of < positions; ++position_of) {
      for (const double frequency : frequencies) {
        out.push_back(static_cast<float>(temperature * of(position_of * frequency)));
      }
    }
    return out;
  }
};

// Queries that lean one way (so that means differ from zero) at random places of a ring.
template <typename Random>
QueryData random_queries(const KvShape& shape, int heads, int rows, int last, Random& random) {
  QueryData out;
  out.heads = heads;
  out.capacity = rows + random.below(9);
  out.rows = rows;
  out.position = last + 1 - rows;
  out.origin = random.below(out.position + 1);
  out.temperature = random.below(2) == 0 ? 1 : 1.2;
  out.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  for (int i = 0; i < shape.head_dim / 2; ++i) {
    out.frequencies.push_back(std::pow(10000.0, -2.0 * i / shape.head_dim));
  }
  const size_t values = static_cast<size_t>(out.capacity) * static_cast<size_t>(heads * shape.key_dim());
  for (size_t i = 0; i < values; ++i) {
    const int dim = static_cast<int>(i % static_cast<size_t>(shape.key_dim()));
    out.q.push_back(dim < shape.head_dim ? to_bf16(random.normal() + (dim % 3 == 0 ? 1.0f : 0.0f)) : bf16{0});
  }
  return out;
}

template <typename Random>
TokenData random_tokens(const KvShape& shape, int tokens, Random& random) {
  TokenData out{.shape = shape, .tokens = tokens, .keys = {}, .values = {}};
  for (int token = 0; token < shape.kv_heads * tokens; ++token) {
    const float length = token % 13 == 5 ? 0.0f : 0.2f + 0.3f * static_cast<float>(random.below(4));
    for (int dim = 0; dim < shape.head_dim; ++dim) {
      out.keys.push_back(to_bf16(length * (random.normal() + (dim == 1 ? 1.0f : 0.0f))));
      out.values.push_back(to_bf16(random.normal()));
    }
  }
  return out;
}

inline std::vector<double> expected_key_scores(const TokenData& data, KeyMeasure measure) {
  const int dims = data.shape.head_dim;
  std::vector<double> out;
  for (int head = 0; head < data.shape.kv_heads; ++head) {
    std::vector<double> length(static_cast<size_t>(data.tokens));
    std::vector<double> mean(static_cast<size_t>(dims));
    for (int token = 0; token < data.tokens; ++token) {
      double square = 0;
      for (int dim = 0; dim < dims; ++dim) {
        square += data.key(head, token, dim) * data.key(head, token, dim);
      }
      length[static_cast<size_t>(token)] = std::sqrt(square);
      for (int dim = 0; dim < dims && square > 0; ++dim) {
        mean[static_cast<size_t>(dim)] += data.key(head, token, dim) / std::sqrt(square);
      }
    }
    double square = 0;
    for (const double x : mean) {
      square += x * x;
    }
    for (int token = 0; token < data.tokens; ++token) {
      double dot = 0;
      for (int dim = 0; dim < dims; ++dim) {
        dot += data.key(head, token, dim) * mean[static_cast<size_t>(dim)];
      }
      const double own = length[static_cast<size_t>(token)];
      const double lengths = own * std::sqrt(square);
      out.push_back(measure == KeyMeasure::smallness ? -own : lengths > 0 ? -dot / lengths : 0);
    }
  }
  return out;
}

// The mean rotation of the future as a matrix, mean and covariance as such.
inline std::vector<double> expected_attention_scores(const TokenData& data, const QueryData& queries, int from,
                                                     int future, int positions, int sinks) {
  const int dims = data.shape.head_dim;
  const int half = dims / 2;
  const auto n = static_cast<size_t>(dims);
  const int first = std::min(from, positions - 1);
  const int last = std::clamp(from + future, first + 1, positions);
  std::vector<double> ahead(n * n);
  for (int position = first; position < last; ++position) {
    for (int i = 0; i < half; ++i) {
      const double angle = position * queries.frequencies[static_cast<size_t>(i)];
      const double share = queries.temperature / (last - first);
      const auto at = [&](int a, int b) -> double& {
        return ahead[static_cast<size_t>(a) * n + static_cast<size_t>(b)];
      };
      at(i, i) += share * std::cos(angle);
      at(i + half, i + half) += share * std::cos(angle);
      at(i, i + half) -= share * std::sin(angle);
      at(i + half, i) += share * std::sin(angle);
    }
  }
  const int group = queries.heads / data.shape.kv_heads;
  std::vector<double> out(static_cast<size_t>(data.shape.kv_heads * data.tokens));
  for (int head = 0; head < queries.heads; ++head) {
    std::vector<double> mean(n);
    std::vector<std::vector<double>> turned;
    for (int row = 0; row < queries.rows; ++row) {
      const int position = queries.position + row;
      const int slot = (position - queries.origin) % queries.capacity;
      const bf16* q = queries.q.data() + static_cast<ptrdiff_t>(slot * queries.heads + head) * data.shape.key_dim();
      std::vector<double> plain(n);
      for (int i = 0; i < half; ++i) {
        const double angle = position * queries.frequencies[static_cast<size_t>(i)];
        const double a = to_float(q[i]) / queries.temperature;
        const double b = to_float(q[i + half]) / queries.temperature;
        plain[static_cast<size_t>(i)] = a * std::cos(angle) + b * std::sin(angle);
        plain[static_cast<size_t>(i + half)] = b * std::cos(angle) - a * std::sin(angle);
      }
      std::vector<double> later(n);
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = 0; b < n; ++b) {
          later[a] += ahead[a * n + b] * plain[b];
        }
        mean[a] += later[a] / queries.rows;
      }
      turned.push_back(later);
    }
    std::vector<double> covariance(n * n);
    for (const std::vector<double>& row : turned) {
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = 0; b < n; ++b) {
          covariance[a * n + b] += (row[a] - mean[a]) * (row[b] - mean[b]) / queries.rows;
        }
      }
    }
    std::vector<double> weights(static_cast<size_t>(data.tokens));
    double sum = 0;
    for (int token = sinks; token < data.tokens; ++token) {
      double linear = 0;
      double square = 0;
      for (size_t a = 0; a < n; ++a) {
        const double key = data.key(head / group, token, static_cast<int>(a));
        double part = 0;
        for (size_t b = 0; b < n; ++b) {
          part += covariance[a * n + b] * data.key(head / group, token, static_cast<int>(b));
        }
        linear += key * mean[a];
        square += key * part;
      }
      weights[static_cast<size_t>(token)] =
          std::exp(queries.scale * linear + queries.scale * queries.scale * square / 2);
      sum += weights[static_cast<size_t>(token)];
    }
    for (int token = 0; token < data.tokens; ++token) {
      double length = 0;
      for (int dim = 0; dim < dims; ++dim) {
        length += data.value(head / group, token, dim) * data.value(head / group, token, dim);
      }
      out[static_cast<size_t>(head / group * data.tokens + token)] +=
          token < sinks ? INFINITY : weights[static_cast<size_t>(token)] / sum / group * std::sqrt(length);
    }
  }
  return out;
}

}  // namespace vericache::test
