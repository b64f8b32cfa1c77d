// Draft attention over resident KV in every format and the bf16 tail, against float64 over the values that the codes
// stand for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/cuda/packed_fixture.h"
#include "backend/cuda/thinned.h"
#include "backend/rotation.h"

namespace vericache::test {
namespace {

constexpr int kBits[] = {2, 3, 4, 6, 8, 16};

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

// What a KV head of a sequence holds, as attention should see it. Slots that nobody wrote hold finite garbage.
struct HeadValues {
  std::vector<double> k;  // (tokens, head_dim)
  std::vector<double> v;
  void add(const std::byte* page, const KvFormat& format, int head_dim, int tokens) {
    for (int t = 0; t < tokens; ++t) {
      std::vector<float> rows[2];
      for (int d = 0; d < head_dim; ++d) {
        rows[0].push_back(static_cast<float>(key_of(page, format, head_dim, t, d)));
        rows[1].push_back(static_cast<float>(value_of(page, format, head_dim, t, d)));
      }
      if (format.rotated) {
        rotate(rows[0].data(), head_dim);
        rotate(rows[1].data(), head_dim);
      }
      k.insert(k.end(), rows[0].begin(), rows[0].end());
      v.insert(v.end(), rows[1].begin(), rows[1].end());
    }
  }
};

int pages_of(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

HostPage random_page(int head_dim, int tokens, Random& random) {
  HostPage page(head_dim, &random);
  for (int t = 0; t < tokens; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      page.key(t, d) = to_bf16(random.normal() + static_cast<float>(d % 5 - 2));
      page.value(t, d) = to_bf16(random.normal());
    }
  }
  return page;
}

// One sequence: resident KV with its own count in every head, and a tail.
class Sequence {
 public:
  Sequence(const KvShape& shape, const KvFormat& format, const std::vector<int>& counts, int tail_position,
           int tail_tokens, Random& random)
      : shape_(shape),
        tail_position_(tail_position),
        tail_tokens_(tail_tokens),
        past_(shape, format, std::max(1, pages_of(*std::max_element(counts.begin(), counts.end()))) + random.below(3),
              random),
        tail_(shape, {}, pages_of(tail_tokens) + random.below(2), random),
        heads_(static_cast<size_t>(shape.kv_heads)) {
    past_.hold(counts);
    DeviceArray<std::byte> source(head_page_bytes({}, shape));
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int page = 0; page < pages_of(counts[static_cast<size_t>(head)]); ++page) {
        const int held = std::min(kPageTokens, counts[static_cast<size_t>(head)] - page * kPageTokens);
        source.write(random_page(shape.head_dim, held, random).bytes());
        cuda::quantize_head_page(source.data(), held, shape, format, past_.place(head, page), nullptr);
        finish();
      }
    }
    const auto stored = past_.read();
    for (int head = 0; head < shape.kv_heads; ++head) {
      HeadValues& values = heads_[static_cast<size_t>(head)];
      const int count = counts[static_cast<size_t>(head)];
      for (int page = 0; page < pages_of(count); ++page) {
        values.add(stored[at(head, past_.pages(), page)].data(), format, shape.head_dim,
                   std::min(kPageTokens, count - page * kPageTokens));
      }
      for (int page = 0; page < pages_of(tail_tokens); ++page) {
        const int held = std::min(kPageTokens, tail_tokens - page * kPageTokens);
        HostPage bytes = random_page(shape.head_dim, held, random);
        tail_.write(head, page, bytes.bytes());
        values.add(bytes.bytes().data(), {}, shape.head_dim, held);
      }
    }
  }

  SequenceRows rows(int row, bool without_past) const {
    SequenceRows out{.first_row = row, .rows = 1, .position = tail_position_ + tail_tokens_ - 1};
    out.kv = {past_.view(), tail_.view(), tail_position_};
    out.kv.tail.tokens = nullptr;
    if (without_past) {
      out.kv.past = {.format = out.kv.past.format};
    }
    return out;
  }
  const HeadValues& head(int head) const { return heads_[static_cast<size_t>(head)]; }

 private:
  KvShape shape_;
  int tail_position_;
  int tail_tokens_;
  DevicePages past_;
  DevicePages tail_;
  std::vector<HeadValues> heads_;
};

struct Expected {
  std::vector<double> out;
  double log_sum_exp = 0;
};
// times: how often each token stands there; empty: once.
Expected attend(const HeadValues& values, const bf16* q, int head_dim, double scale,
                const std::vector<double>& times = {}) {
  const size_t tokens = values.k.size() / static_cast<size_t>(head_dim);
  std::vector<double> scores(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t d = 0; d < static_cast<size_t>(head_dim); ++d) {
      scores[t] += scale * double{to_float(q[d])} * values.k[t * static_cast<size_t>(head_dim) + d];
    }
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  Expected expected{std::vector<double>(static_cast<size_t>(head_dim))};
  double sum = 0;
  for (size_t t = 0; t < tokens; ++t) {
    const double weight = std::exp(scores[t] - top) * (times.empty() ? 1.0 : times[t]);
    sum += weight;
    for (size_t d = 0; d < static_cast<size_t>(head_dim); ++d) {
      expected.out[d] += weight * values.v[t * static_cast<size_t>(head_dim) + d];
    }
  }
  for (double& x : expected.out) {
    x /= sum;
  }
  expected.log_sum_exp = top + std::log(sum);
  return expected;
}

// ||got - expected|| / ||expected||; infinite where something is not a number.
double relative_error(const bf16* got, const std::vector<double>& expected) {
  double difference = 0;
  double norm = 0;
  for (size_t d = 0; d < expected.size(); ++d) {
    difference += std::pow(double{to_float(got[d])} - expected[d], 2);
    norm += std::pow(expected[d], 2);
  }
  const double error = std::sqrt(difference / norm);
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

struct Outcome {
  std::vector<bf16> out;
  std::vector<float> log_sum_exp;
};

// Layer 1 of two, of which layer 0 is empty.
Outcome run(const KvShape& shape, const KvFormat& format, int heads, float scale, const std::vector<bf16>& q,
            const std::vector<SequenceRows>& rows, int longest_tokens) {
  const int count = static_cast<int>(rows.size());
  std::vector<SequenceRows> staged(rows.size());
  staged.insert(staged.end(), rows.begin(), rows.end());
  const DeviceArray<SequenceRows> sequences(staged);
  const cuda::StagedPass pass{.rows = count, .count = count, .draft = true, .sequences = sequences.data()};
  const DeviceArray<bf16> device_q(q);
  const DeviceArray<bf16> out(at(count, heads * shape.head_dim));
  const DeviceArray<float> log_sum_exp(at(count, heads));
  const cuda::Limits limits{
      .shape = shape, .heads = heads, .max_rows = 64, .max_sequences = 64, .max_context_tokens = longest_tokens};
  const DeviceArray<float> scratch(cuda::draft_attention_scratch_bytes(limits) / sizeof(float));
  const DeviceArray<int> counts(std::vector<int>(cuda::draft_attention_counts(limits)));
  AttentionArgs args{.shape = shape, .heads = heads, .scale = scale, .q = device_q.data(), .layer = 1};
  args.out = out.data();
  args.log_sum_exp = log_sum_exp.data();
  cuda::draft_attention(args, format, pass, longest_tokens, 0, scratch.data(), counts.data(), nullptr);
  finish();
  const std::vector<int> counted = counts.read();
  EXPECT_EQ(std::count(counted.begin(), counted.end(), 0), static_cast<ptrdiff_t>(counted.size()));
  return {out.read(), log_sum_exp.read()};
}

int random_count(int most, Random& random) {
  switch (random.below(4)) {
    case 0:
      return 0;
    case 1:
      return random.between(1, kPageTokens - 1);
    case 2:
      return kPageTokens * random.between(0, most / kPageTokens);
    default:
      return random.between(1, most);
  }
}

void check_batch(const KvShape& shape, const KvFormat& format, int group, int count, Random& random) {
  if (left_out()) {
    return;
  }
  const int heads = group * shape.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<int> places(static_cast<size_t>(count));
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), random.engine());
  std::vector<SequenceRows> rows;
  int longest = 0;
  for (int i = 0; i < count; ++i) {
    std::vector<int> counts(static_cast<size_t>(shape.kv_heads));
    const bool empty = random.below(6) == 0;
    for (int& held : counts) {
      held = empty ? 0 : random_count(700, random);
    }
    const int tail_tokens = random.between(1, 200);
    const int most = *std::max_element(counts.begin(), counts.end());
    const int tail_position = most + random.below(3) * kPageTokens;
    sequences.push_back(std::make_unique<Sequence>(shape, format, counts, tail_position, tail_tokens, random));
    rows.push_back(sequences.back()->rows(places[static_cast<size_t>(i)], empty && random.below(2) == 0));
    longest = std::max(longest, most + tail_tokens);
  }
  const std::vector<bf16> q = random.bf16s(at(count, heads * shape.head_dim), 1.5f);
  const Outcome got = run(shape, format, heads, scale, q, rows, longest);
  for (int i = 0; i < count; ++i) {
    const int row = places[static_cast<size_t>(i)];
    for (int head = 0; head < heads; ++head) {
      const size_t first = at(row * heads + head, shape.head_dim);
      const Expected expected = attend(sequences[static_cast<size_t>(i)]->head(head / group), q.data() + first,
                                       shape.head_dim, double{scale});
      ASSERT_LT(relative_error(got.out.data() + first, expected.out), 1.5e-2) << "row " << row << ", head " << head;
      ASSERT_NEAR(got.log_sum_exp[at(row, heads, head)], expected.log_sum_exp, 2e-2)
          << "row " << row << ", head " << head;
    }
  }
  // No order of arrival shows; a launch sized for longer sequences serves as well.
  const Outcome again = run(shape, format, heads, scale, q, rows, longest);
  ASSERT_TRUE(again.out == got.out && again.log_sum_exp == got.log_sum_exp);
  const Outcome longer = run(shape, format, heads, scale, q, rows, longest + 5000);
  for (size_t i = 0; i < got.log_sum_exp.size(); ++i) {
    ASSERT_NEAR(longer.log_sum_exp[i], got.log_sum_exp[i], 1e-4);
  }
}

TEST(CudaDraftAttention, EveryFormatAgainstFloat64) {
  Random random(70);
  const int groups[] = {1, 2, 3, 4, 5, 8};
  int turn = 0;
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const int key_bits : kBits) {
      for (const int value_bits : kBits) {
        const int group = groups[turn++ % 6];
        SCOPED_TRACE(testing::Message() << head_dim << " dims, " << key_bits << " and " << value_bits << " bits, group "
                                        << group);
        check_batch({1, random.between(1, 3), head_dim}, {key_bits, value_bits}, group, random.between(1, 3), random);
        if (HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

TEST(CudaDraftAttention, FormatsByTokenAgainstFloat64) {
  Random random(73);
  const int groups[] = {1, 2, 4, 7, 12};
  int turn = 0;
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const KvFormat& format : kByToken) {
      const int group = groups[turn++ % 5];
      SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " and " << format.value_bits
                                      << " bits, code " << static_cast<int>(format.code) << ", group " << group);
      check_batch({1, random.between(1, 3), head_dim}, format, group, random.between(1, 3), random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(CudaDraftAttention, NonUniformFormatsAgainstFloat64) {
  Random random(75);
  const int groups[] = {1, 2, 4, 7, 12};
  int turn = 0;
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const KvFormat& format : kNuq) {
      const int group = groups[turn++ % 5];
      SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " and " << format.value_bits
                                      << " bits, outliers " << format.outliers << ", group " << group);
      check_batch({1, random.between(1, 3), head_dim}, format, group, random.between(1, 3), random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(CudaDraftAttention, RotatedFormatsAgainstFloat64) {
  Random random(74);
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const KvFormat& format : kRotated) {
      SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " and " << format.value_bits
                                      << " bits");
      check_batch({1, random.between(1, 3), head_dim}, format, random.between(1, 9), random.between(1, 3), random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(CudaDraftAttention, GroupsWiderThanATile) {
  Random random(71);
  for (const int group : {9, 12, 16}) {
    SCOPED_TRACE(testing::Message() << "group " << group);
    check_batch({1, 2, 64}, {4, 4}, group, 2, random);
    if (HasFatalFailure()) {
      return;
    }
  }
}

// Many pages: the same few stand in every table again and again.
void check_long(const KvShape& shape, const KvFormat& format, int group, int count, int tokens, Random& random) {
  constexpr int kFew = 8 * kPageTokens;
  const int heads = group * shape.kv_heads;
  const float scale = 0.2f;
  std::vector<SequenceRows> rows;
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::unique_ptr<DeviceArray<std::byte*>>> tables;
  const DeviceArray<int> held(std::vector<int>(static_cast<size_t>(shape.kv_heads), tokens));
  for (int i = 0; i < count; ++i) {
    const std::vector<int> counts(static_cast<size_t>(shape.kv_heads), kFew);
    sequences.push_back(std::make_unique<Sequence>(shape, format, counts, tokens, 1, random));
    SequenceRows sequence = sequences.back()->rows(i, false);
    const KvView& view = sequence.kv.past;
    std::vector<std::byte*> few(at(shape.kv_heads, view.page_stride));
    cuda::check_cuda(cudaMemcpy(few.data(), view.head_pages, few.size() * sizeof(std::byte*), cudaMemcpyDeviceToHost),
                     "a table of pages");
    std::vector<std::byte*> table;
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int page = 0; page < pages_of(tokens); ++page) {
        table.push_back(few[at(head, view.page_stride, page % 8)]);
      }
    }
    tables.push_back(std::make_unique<DeviceArray<std::byte*>>(table));
    sequence.kv.past.head_pages = tables.back()->data();
    sequence.kv.past.page_stride = pages_of(tokens);
    sequence.kv.past.tokens = held.data();
    rows.push_back(sequence);
  }
  std::vector<double> times(kFew + 1, 1.0);  // each of the few tokens, then that of the tail
  for (int t = 0; t < kFew; ++t) {
    times[static_cast<size_t>(t)] = tokens / kFew + (t < tokens % kFew ? 1 : 0);
  }
  const std::vector<bf16> q = random.bf16s(at(count, heads * shape.head_dim));
  const Outcome got = run(shape, format, heads, scale, q, rows, tokens + 1);
  for (int i = 0; i < count; ++i) {
    for (int head = 0; head < heads; ++head) {
      const size_t first = at(i * heads + head, shape.head_dim);
      const Expected expected = attend(sequences[static_cast<size_t>(i)]->head(head / group), q.data() + first,
                                       shape.head_dim, double{scale}, times);
      ASSERT_LT(relative_error(got.out.data() + first, expected.out), 1.5e-2) << "row " << i << ", head " << head;
      ASSERT_NEAR(got.log_sum_exp[at(i, heads, head)], expected.log_sum_exp, 2e-2) << "row " << i << ", head " << head;
    }
  }
}

// More blocks than one wave takes; then more pages of a warp than it keeps addresses of.
TEST(CudaDraftAttention, LongSequences) {
  Random random(72);
  check_long({1, 2, 32}, {4, 4}, 2, 8, 2000 * kPageTokens - 17, random);
  check_long({1, 4, 32}, {8, 8, KvCode::plane}, 1, 64, 900 * kPageTokens - 1, random);
}

}  // namespace
}  // namespace vericache::test
