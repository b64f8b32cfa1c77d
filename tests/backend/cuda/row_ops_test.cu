// Row ops: values against float64 on random passes of random shapes, and rule 1: a row's bits are the same beside other
// rows as alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "backend/cuda/device_array.h"
#include "backend/cuda/layout.h"
#include "backend/random_fill.h"

namespace vericache::cuda::test {
namespace {

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int between(int low, int high) { return low + static_cast<int>(engine_() % static_cast<uint64_t>(high - low + 1)); }
  std::vector<float> floats(size_t count, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(count);
    for (float& value : values) {
      value = normal(engine_);
    }
    return values;
  }
  std::vector<bf16> bf16s(size_t count) {
    std::vector<bf16> values;
    for (const float value : floats(count)) {
      values.push_back(to_bf16(value));
    }
    return values;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// A bf16 result may be the neighbour of the rounded exact value where float arithmetic stood on the other side of a
// tie.
void expect_bf16(double expected, bf16 result, const char* what, int row, int column) {
  const double tolerance = std::abs(expected) / 128 * 0.51 + 1e-6;
  ASSERT_NEAR(static_cast<double>(to_float(result)), expected, tolerance) << what << " " << row << ", " << column;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
std::vector<T> slice(const std::vector<T>& values, size_t first, size_t count) {
  return {values.begin() + static_cast<ptrdiff_t>(first), values.begin() + static_cast<ptrdiff_t>(first + count)};
}

// A pass of some sequences, in one layer of several, with tails of their own.
struct Pass {
  Pass(const std::vector<int>& row_counts, const std::vector<int>& positions, const std::vector<int>& tail_positions,
       const KvShape& shape, int heads, int ring, Random& random)
      : count(static_cast<int>(row_counts.size())),
        rows_of(row_counts),
        position_of(positions),
        tail_of(tail_positions),
        page_values(static_cast<size_t>(kPageTokens) * static_cast<size_t>(2 * shape.head_dim)) {
    for (int i = 0; i < count; ++i) {
      const size_t s = static_cast<size_t>(i);
      const int pages = (positions[s] + row_counts[s] - tail_positions[s] + kPageTokens - 1) / kPageTokens;
      tail_pages.push_back(pages);
      rows += row_counts[s];
    }
    layout(shape, heads, ring, random);
  }

  void layout(const KvShape& shape, int heads, int ring, Random& random) {
    int slots = 0;
    for (const int pages : tail_pages) {
      slots += pages * shape.kv_heads;
    }
    arena = std::make_unique<DeviceArray<bf16>>(static_cast<size_t>(slots) * page_values);
    tokens = std::make_unique<PinnedArray<TokenId>>(static_cast<size_t>(count) * kContext);
    rings = std::make_unique<DeviceArray<bf16>>(at(count * std::max(ring, 1), heads * shape.head_dim));
    ring_sums = std::make_unique<DeviceArray<float>>(at(count * std::max(ring, 1), heads));
    std::vector<int> order(static_cast<size_t>(slots));
    for (int i = 0; i < slots; ++i) {
      order[static_cast<size_t>(i)] = i;
    }
    std::shuffle(order.begin(), order.end(), random.engine());
    std::vector<std::byte*> table;
    slot_of.clear();
    for (const int slot : order) {
      table.push_back(reinterpret_cast<std::byte*>(arena->data() + static_cast<size_t>(slot) * page_values));
      slot_of.push_back(slot);
    }
    tables = std::make_unique<DeviceArray<std::byte*>>(table);
    std::vector<SequenceRows> all(static_cast<size_t>(kLayers * count));
    std::vector<int> sequence_of_row;
    int first_row = 0;
    int first_slot = 0;
    for (int i = 0; i < count; ++i) {
      const size_t s = static_cast<size_t>(i);
      first_slot_of.push_back(first_slot);
      SequenceRows& sequence = all[static_cast<size_t>(kLayer * count + i)];
      sequence = {.first_row = first_row, .rows = rows_of[s], .position = position_of[s]};
      sequence.tokens = tokens->data() + at(i, kContext);
      sequence.kv.tail = {.format = {}, .head_pages = tables->data() + first_slot, .page_stride = tail_pages[s]};
      sequence.kv.tail_position = tail_of[s];
      sequence.queries = {rings->data() + at(i * ring, heads * shape.head_dim), ring_sums->data() + at(i * ring, heads),
                          ring};
      sequence.token_lag = i == 1 ? kLag : 0;
      all[s] = sequence;  // embed reads layer 0
      first_row += rows_of[s];
      first_slot += tail_pages[s] * shape.kv_heads;
      sequence_of_row.insert(sequence_of_row.end(), static_cast<size_t>(rows_of[s]), i);
    }
    sequences = std::make_unique<DeviceArray<SequenceRows>>(all);
    rows_table = std::make_unique<DeviceArray<int>>(sequence_of_row);
    host_sequence_of_row = sequence_of_row;
    staged = {.rows = rows, .count = count, .draft = false, .sequences = sequences->data()};
    staged.sequence_of_row = rows_table->data();
  }

  int position(int row) const {
    int first = 0;
    const int s = host_sequence_of_row[static_cast<size_t>(row)];
    for (int i = 0; i < s; ++i) {
      first += rows_of[static_cast<size_t>(i)];
    }
    return position_of[static_cast<size_t>(s)] + row - first;
  }
  // Where a head's page of a sequence's tail begins in the arena, in values.
  size_t page(int sequence, int head, int index) const {
    const size_t s = static_cast<size_t>(sequence);
    const int entry = first_slot_of[s] + head * tail_pages[s] + index;
    return static_cast<size_t>(slot_of[static_cast<size_t>(entry)]) * page_values;
  }

  static constexpr int kLag = 4;  // of the second sequence's tokens
  static constexpr int kLayers = 3;
  static constexpr int kLayer = 2;
  static constexpr int kContext = 1024;
  int count;
  int rows = 0;
  std::vector<int> rows_of, position_of, tail_of, tail_pages, first_slot_of, slot_of, host_sequence_of_row;
  size_t page_values;
  std::unique_ptr<DeviceArray<bf16>> arena, rings;
  std::unique_ptr<DeviceArray<float>> ring_sums;
  std::unique_ptr<PinnedArray<TokenId>> tokens;
  std::unique_ptr<DeviceArray<std::byte*>> tables;
  std::unique_ptr<DeviceArray<SequenceRows>> sequences;
  std::unique_ptr<DeviceArray<int>> rows_table;
  StagedPass staged;
};

TEST(CudaRowOps, EmbedsTheTokensOfTheSequences) {
  Random random(1);
  for (const int in : {8, 48, 100, 512, 4096}) {
    const int vocabulary = 300;
    std::vector<bf16> table = random.bf16s(at(vocabulary, padded_dim(in)));
    const DeviceArray<bf16> device_table(table);
    const Pass pass({1, 5, 70}, {0, 9, 64}, {0, 0, 64}, {1, 1, 32}, 1, 0, random);
    for (size_t i = 0; i < 3 * size_t{Pass::kContext}; ++i) {
      (*pass.tokens)[i] = random.between(0, vocabulary - 1);
    }
    const DeviceArray<float> out(at(pass.rows, in));
    embed({vocabulary, in, device_table.data()}, pass.staged, out.data(), nullptr);
    finish();
    const std::vector<float> result = out.read();
    for (int row = 0; row < pass.rows; ++row) {
      const int sequence = pass.host_sequence_of_row[static_cast<size_t>(row)];
      const int token =
          (*pass.tokens)[at(sequence, Pass::kContext, pass.position(row) - (sequence == 1 ? Pass::kLag : 0))];
      for (int i = 0; i < in; ++i) {
        ASSERT_EQ(result[at(row, in, i)], to_float(table[at(token, padded_dim(in), i)])) << row << ", " << i;
      }
    }
  }
}

TEST(CudaRowOps, AddsBias) {
  Random random(2);
  for (const int dim : {1, 30, 512, 2052}) {
    const int rows = 7;
    const std::vector<float> bias = random.floats(static_cast<size_t>(dim));
    const std::vector<float> before = random.floats(at(rows, dim));
    const DeviceArray<float> device_bias(bias);
    const DeviceArray<float> y(before);
    add_bias(device_bias.data(), rows, dim, y.data(), nullptr);
    finish();
    const std::vector<float> result = y.read();
    for (size_t i = 0; i < before.size(); ++i) {
      ASSERT_EQ(result[i], before[i] + bias[i % static_cast<size_t>(dim)]);
    }
  }
}

TEST(CudaRowOps, RmsNormAgreesAndKeepsRows) {
  Random random(3);
  constexpr float kEps = 1e-5f;
  for (const int dim : {4, 30, 33, 512, 1000, 4096, 5120, 8192, 16384, 18000}) {
    const int rows = 19;
    const int padded = padded_dim(dim);
    const std::vector<float> x = random.floats(at(rows, dim), 3.0f);
    const std::vector<float> weight = random.floats(static_cast<size_t>(dim));
    const DeviceArray<float> device_x(x);
    const DeviceArray<float> device_weight(weight);
    const DeviceArray<bf16> out(at(rows, padded));
    rms_norm(device_x.data(), device_weight.data(), kEps, rows, dim, out.data(), nullptr);
    finish();
    const std::vector<bf16> result = out.read();
    for (int row = 0; row < rows; ++row) {
      double squares = 0;
      for (int i = 0; i < dim; ++i) {
        squares += std::pow(static_cast<double>(x[at(row, dim, i)]), 2);
      }
      const double factor = 1 / std::sqrt(squares / dim + static_cast<double>(kEps));
      for (int i = 0; i < padded; ++i) {
        const double expected = i < dim ? static_cast<double>(x[at(row, dim, i)]) * factor *
                                              static_cast<double>(weight[static_cast<size_t>(i)])
                                        : 0;
        expect_bf16(expected, result[at(row, padded, i)], "rms_norm", row, i);
      }
      if (row % 5 == 0) {  // alone
        const DeviceArray<float> one(slice(x, at(row, dim), static_cast<size_t>(dim)));
        const DeviceArray<bf16> one_out(static_cast<size_t>(padded));
        rms_norm(one.data(), device_weight.data(), kEps, 1, dim, one_out.data(), nullptr);
        finish();
        EXPECT_TRUE(same_bits(one_out.read(), slice(result, at(row, padded), static_cast<size_t>(padded)))) << row;
      }
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(CudaRowOps, SiluTimesUp) {
  Random random(4);
  for (const int dim : {1, 40, 100, 1280, 14336}) {
    const int rows = 5;
    const int padded = padded_dim(dim);
    std::vector<float> gate_up = random.floats(at(rows, 2 * dim), 4.0f);
    gate_up[0] = -200.0f;
    gate_up[at(1, 2 * dim)] = 200.0f;
    const DeviceArray<float> device_gate_up(gate_up);
    const DeviceArray<bf16> out(at(rows, padded));
    silu_mul(device_gate_up.data(), rows, dim, out.data(), nullptr);
    finish();
    const std::vector<bf16> result = out.read();
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < padded; ++i) {
        double expected = 0;
        if (i < dim) {
          const double gate = static_cast<double>(gate_up[at(row, 2 * dim, i)]);
          expected = gate / (1 + std::exp(-gate)) * static_cast<double>(gate_up[at(row, 2 * dim, dim + i)]);
        }
        expect_bf16(expected, result[at(row, padded, i)], "silu_mul", row, i);
        if (HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

// One head of float64: bias, norm, rotation.
std::vector<double> head_of(const float* x, const float* bias, const float* norm, double eps, const float* cos,
                            const float* sin, int head_dim) {
  std::vector<double> v(static_cast<size_t>(head_dim));
  double squares = 0;
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = static_cast<double>(x[i]) + (bias == nullptr ? 0 : static_cast<double>(bias[i]));
    squares += v[i] * v[i];
  }
  for (size_t i = 0; norm != nullptr && i < v.size(); ++i) {
    v[i] *= static_cast<double>(norm[i]) / std::sqrt(squares / head_dim + eps);
  }
  const size_t half = v.size() / 2;
  for (size_t i = 0; cos != nullptr && i < half; ++i) {
    const double left = v[i];
    const double right = v[half + i];
    v[i] = left * static_cast<double>(cos[i]) - right * static_cast<double>(sin[i]);
    v[half + i] = right * static_cast<double>(cos[i]) + left * static_cast<double>(sin[i]);
  }
  return v;
}

void expect_head(const std::vector<double>& expected, const std::vector<double>& scale, const std::vector<bf16>& values,
                 const std::vector<size_t>& places, const char* what, int row) {
  for (size_t i = 0; i < expected.size(); ++i) {
    // A rotation may cancel: the error is that of its terms.
    const double tolerance = std::abs(expected[i]) / 128 * 0.51 + scale[i] * 1e-5 + 1e-6;
    ASSERT_NEAR(static_cast<double>(to_float(values[places[i]])), expected[i], tolerance) << what << " of row " << row;
  }
}

struct QkvCase {
  int head_dim;
  int heads;
  int kv_heads;
  bool bias;
  bool norm;
};

void expect_store_qkv(const QkvCase& c, Random& random) {
  const KvShape shape{Pass::kLayers, c.kv_heads, c.head_dim};
  const Pass pass({3, 1, 90, 17}, {62, 500, 64, 128}, {0, 448, 64, 128}, shape, c.heads, 0, random);
  const int all_heads = c.heads + 2 * c.kv_heads;
  const int width = all_heads * c.head_dim;
  const std::vector<float> qkv = random.floats(at(pass.rows, width));
  const std::vector<float> bias = random.floats(static_cast<size_t>(width));
  const std::vector<float> q_norm = random.floats(static_cast<size_t>(c.head_dim));
  const std::vector<float> k_norm = random.floats(static_cast<size_t>(c.head_dim));
  const int half = c.head_dim / 2;
  const std::vector<float> cos = random.floats(at(Pass::kContext, half));
  const std::vector<float> sin = random.floats(at(Pass::kContext, half));
  const DeviceArray<float> d_qkv(qkv), d_bias(bias), d_q_norm(q_norm), d_k_norm(k_norm), d_cos(cos), d_sin(sin);
  const DeviceArray<bf16> q(at(pass.rows, c.heads * c.head_dim));
  const std::vector<bf16> untouched = pass.arena->read();
  store_qkv({.shape = shape,
             .heads = c.heads,
             .qkv = d_qkv.data(),
             .bias = c.bias ? d_bias.data() : nullptr,
             .q_norm = c.norm ? d_q_norm.data() : nullptr,
             .k_norm = c.norm ? d_k_norm.data() : nullptr,
             .norm_eps = 1e-6f,
             .rope = {d_cos.data(), d_sin.data(), Pass::kContext},
             .pass = nullptr,
             .layer = Pass::kLayer,
             .q = q.data()},
            pass.staged, nullptr);
  finish();
  const std::vector<bf16> q_result = q.read();
  const std::vector<bf16> arena = pass.arena->read();
  std::vector<bool> written(arena.size(), false);
  for (int row = 0; row < pass.rows; ++row) {
    const int position = pass.position(row);
    const int sequence = pass.host_sequence_of_row[static_cast<size_t>(row)];
    const int slot = position - pass.tail_of[static_cast<size_t>(sequence)];
    for (int head = 0; head < all_heads; ++head) {
      const bool is_q = head < c.heads;
      const bool is_v = head >= c.heads + c.kv_heads;
      const float* norm = !c.norm || is_v ? nullptr : is_q ? q_norm.data() : k_norm.data();
      const float* x = qkv.data() + at(row, width, head * c.head_dim);
      const float* b = c.bias ? bias.data() + at(head, c.head_dim) : nullptr;
      const std::vector<double> plain = head_of(x, b, norm, 1e-6, nullptr, nullptr, c.head_dim);
      const std::vector<double> expected = head_of(x, b, norm, 1e-6, is_v ? nullptr : cos.data() + at(position, half),
                                                   is_v ? nullptr : sin.data() + at(position, half), c.head_dim);
      std::vector<double> scale;
      std::vector<size_t> places;
      const int kv_head = is_v ? head - c.heads - c.kv_heads : head - c.heads;
      const size_t page = is_q ? 0 : pass.page(sequence, kv_head, slot / kPageTokens);
      for (int d = 0; d < c.head_dim; ++d) {
        scale.push_back(8 * (std::abs(plain[static_cast<size_t>(d)]) +
                             std::abs(plain[static_cast<size_t>((d + half) % c.head_dim)])));
        if (is_q) {
          places.push_back(at(row * c.heads + head, c.head_dim, d));
        } else if (is_v) {
          places.push_back(page + static_cast<size_t>(kPageTokens * c.head_dim) +
                           value_index(slot % kPageTokens, d, c.head_dim));
        } else {
          places.push_back(page + key_index(slot % kPageTokens, d));
        }
        if (!is_q) {
          written[places.back()] = true;
        }
      }
      expect_head(expected, scale, is_q ? q_result : arena, places, is_q ? "q" : is_v ? "v" : "k", row);
      if (::testing::Test::HasFatalFailure()) {
        return;
      }
    }
  }
  for (size_t i = 0; i < arena.size(); ++i) {
    ASSERT_TRUE(written[i] || arena[i] == untouched[i]) << "a slot of no row was written";
  }
}

TEST(CudaRowOps, StoresQkvOfEveryHeadSize) {
  Random random(5);
  for (const QkvCase& c :
       {QkvCase{128, 8, 2, false, false}, QkvCase{128, 3, 3, true, true}, QkvCase{64, 4, 1, true, false},
        QkvCase{96, 6, 2, false, true}, QkvCase{32, 2, 1, true, true}}) {
    expect_store_qkv(c, random);
  }
}

// The same row alone, at the same position of a tail that begins elsewhere.
TEST(CudaRowOps, StoreQkvKeepsRows) {
  Random random(6);
  const KvShape shape{Pass::kLayers, 2, 128};
  const int heads = 4;
  const int width = (heads + 2 * shape.kv_heads) * shape.head_dim;
  const Pass many({40, 30}, {64, 70}, {64, 64}, shape, heads, 0, random);
  const Pass alone({1}, {77}, {0}, shape, heads, 0, random);
  const int row = 47;  // of sequence 1, position 77
  ASSERT_EQ(many.position(row), 77);
  const std::vector<float> qkv = random.floats(at(many.rows, width));
  const std::vector<float> cos = random.floats(at(Pass::kContext, 64));
  const std::vector<float> norm = random.floats(128);
  const DeviceArray<float> d_cos(cos), d_norm(norm), d_qkv(qkv);
  const DeviceArray<float> d_row(slice(qkv, at(row, width), static_cast<size_t>(width)));
  const DeviceArray<bf16> q_many(at(many.rows, heads * 128));
  const DeviceArray<bf16> q_alone(at(1, heads * 128));
  QkvArgs args{.shape = shape, .heads = heads, .qkv = d_qkv.data(), .q_norm = d_norm.data(), .k_norm = d_norm.data()};
  args.norm_eps = 1e-5f;
  args.rope = {d_cos.data(), d_cos.data(), Pass::kContext};
  args.layer = Pass::kLayer;
  args.q = q_many.data();
  store_qkv(args, many.staged, nullptr);
  args.qkv = d_row.data();
  args.q = q_alone.data();
  store_qkv(args, alone.staged, nullptr);
  finish();
  EXPECT_TRUE(same_bits(q_alone.read(), slice(q_many.read(), at(row, heads * 128), heads * 128)));
  const std::vector<bf16> a = many.arena->read();
  const std::vector<bf16> b = alone.arena->read();
  for (int head = 0; head < shape.kv_heads; ++head) {
    for (int d = 0; d < 128; ++d) {
      const size_t in_many = many.page(1, head, 0);
      const size_t in_alone = alone.page(0, head, 1);
      EXPECT_EQ(a[in_many + key_index(13, d)], b[in_alone + key_index(13, d)]);
      EXPECT_EQ(a[in_many + 64 * 128 + value_index(13, d, 128)], b[in_alone + 64 * 128 + value_index(13, d, 128)]);
    }
  }
}

TEST(CudaRowOps, SelectsTheRowsThatWantLogits) {
  Random random(7);
  for (const int dim : {30, 512, 4096}) {
    const std::vector<float> x = random.floats(at(50, dim));
    const std::vector<int> chosen{49, 0, 7, 7, 31};
    std::vector<LogitRow> logit_rows;
    for (const int row : chosen) {
      logit_rows.push_back({.row = row});
    }
    const DeviceArray<float> device_x(x);
    const DeviceArray<LogitRow> device_rows(logit_rows);
    const DeviceArray<float> out(at(static_cast<int>(chosen.size()), dim));
    StagedPass pass{.rows = 50};
    pass.logit_rows = device_rows.data();
    pass.logit_count = static_cast<int>(chosen.size());
    select_rows(device_x.data(), pass, dim, out.data(), nullptr);
    finish();
    const std::vector<float> result = out.read();
    for (size_t i = 0; i < chosen.size(); ++i) {
      EXPECT_TRUE(same_bits(slice(result, i * static_cast<size_t>(dim), static_cast<size_t>(dim)),
                            slice(x, at(chosen[i], dim), static_cast<size_t>(dim))));
    }
  }
}

TEST(CudaRowOps, KeepsTheLastQueriesInTheirRings) {
  Random random(8);
  const KvShape shape{Pass::kLayers, 1, 64};
  constexpr int kHeads = 3;
  constexpr int kRing = 16;
  const Pass pass({40, 5, 16}, {100, 30, 64}, {64, 0, 64}, shape, kHeads, kRing, random);
  const std::vector<bf16> q = random.bf16s(at(pass.rows, kHeads * 64));
  const std::vector<float> sums = random.floats(at(pass.rows, kHeads));
  const DeviceArray<bf16> d_q(q);
  const DeviceArray<float> d_sums(sums);
  const std::vector<bf16> before = pass.rings->read();
  keep_queries(d_q.data(), d_sums.data(), kHeads, shape, pass.staged, Pass::kLayer, nullptr);
  finish();
  const std::vector<bf16> ring = pass.rings->read();
  const std::vector<float> ring_sums = pass.ring_sums->read();
  for (int s = 0; s < pass.count; ++s) {
    const int first = pass.position_of[static_cast<size_t>(s)];
    const int end = first + pass.rows_of[static_cast<size_t>(s)];
    std::vector<int> position_in(kRing, -1);
    for (int p = std::max(first, end - kRing); p < end; ++p) {
      position_in[static_cast<size_t>(p % kRing)] = p;
    }
    int first_row = 0;
    while (pass.host_sequence_of_row[static_cast<size_t>(first_row)] != s) {
      ++first_row;
    }
    for (int slot = 0; slot < kRing; ++slot) {
      const size_t place = at(s * kRing + slot, kHeads * 64);
      const int p = position_in[static_cast<size_t>(slot)];
      const std::vector<bf16> expected =
          p < 0 ? slice(before, place, kHeads * 64) : slice(q, at(first_row + p - first, kHeads * 64), kHeads * 64);
      EXPECT_TRUE(same_bits(slice(ring, place, kHeads * 64), expected)) << s << ", " << slot;
      for (int h = 0; p >= 0 && h < kHeads; ++h) {
        EXPECT_EQ(ring_sums[at(s * kRing + slot, kHeads, h)], sums[at(first_row + p - first, kHeads, h)]);
      }
    }
  }
}

TEST(CudaRowOps, RandomWeightsAreThoseOfTheCpu) {
  for (const int in : {5, 64, 100}) {
    const int out = 37;
    const DeviceArray<bf16> data(at(out, padded_dim(in)));
    PackedMatrix matrix{out, in, data.data()};
    constexpr uint64_t kSeed = 0x123456789abcdefull;
    fill_random(matrix, kSeed, 0.37f, nullptr);
    finish();
    const std::vector<bf16> result = data.read();
    for (int row = 0; row < out; ++row) {
      for (int i = 0; i < padded_dim(in); ++i) {
        const bf16 expected = i < in ? random_value(kSeed, row, i, 0.37f) : bf16{0};
        ASSERT_EQ(result[at(row, padded_dim(in), i)], expected) << row << ", " << i;
      }
    }
  }
}

}  // namespace
}  // namespace vericache::cuda::test
