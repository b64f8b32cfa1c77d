// Queries that look at some directions of a head far more than at others, and keys to be rounded by them: for the tests
// of key rounding on every backend.
#pragma once

#include <cmath>

#include "backend/kv_fixture.h"
#include "backend/rotation.h"

namespace vericache::test {

struct RoundingCase {
  // rows queries of each of `heads` heads, in a ring that begins anywhere.
  RoundingCase(const KvShape& shape, int heads, int rows, Random& random)
      : shape(shape), heads(heads), rows(rows), capacity(rows + random.below(4)), position(random.below(1000)) {
    const int directions = shape.head_dim / 4;
    const std::vector<float> mix = random.floats(static_cast<size_t>(directions * shape.head_dim));
    queries.resize(static_cast<size_t>(capacity * heads * shape.key_dim()), bf16{0});
    for (int row = 0; row < rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        const std::vector<float> along = random.floats(static_cast<size_t>(directions));
        bf16* q = queries.data() + static_cast<ptrdiff_t>(place(row) * heads + head) * shape.key_dim();
        for (int d = 0; d < shape.head_dim; ++d) {
          float x = random.normal(0.2f);
          for (int i = 0; i < directions; ++i) {
            x += along[static_cast<size_t>(i)] * mix[static_cast<size_t>(i * shape.head_dim + d)];
          }
          q[d] = to_bf16(x);
        }
      }
    }
  }
  int origin() const { return position - position % 3; }
  int place(int row) const { return (position + row - origin()) % capacity; }
  RoundingArgs args(bf16* matrix) {
    return {.shape = shape,
            .heads = heads,
            .queries = {queries.data(), nullptr, capacity, origin()},
            .rows = rows,
            .position = position,
            .matrix = matrix};
  }
  const bf16* query(int row, int head) const {
    return queries.data() + static_cast<ptrdiff_t>(place(row) * heads + head) * shape.key_dim();
  }
  // The mean square of what the queries of a KV head see of an error; error (head_dim), not rotated.
  template <typename ErrorAt>
  double seen(int kv_head, const ErrorAt& error) const {
    const int group = heads / shape.kv_heads;
    double sum = 0;
    for (int i = 0; i < rows * group; ++i) {
      const bf16* q = query(i / group, kv_head * group + i % group);
      double product = 0;
      for (int d = 0; d < shape.head_dim; ++d) {
        product += static_cast<double>(to_float(q[d])) * error(d);
      }
      sum += product * product;
    }
    return sum / (rows * group);
  }

  KvShape shape;
  int heads;
  int rows;
  int capacity;
  int position;
  std::vector<bf16> queries;  // (capacity, heads, key_dim)
};

}  // namespace vericache::test
