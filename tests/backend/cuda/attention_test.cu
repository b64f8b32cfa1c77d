// Exact attention on the GPU against float64, and the bits of its rows under other company, chunking, splits and
// places.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <tuple>

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/device_array.h"
#include "backend/cuda/layout.h"
#include "backend/cuda/ops.h"

namespace vericache::cuda {
namespace {

using test::DeviceArray;
using test::finish;

size_t at(int row, int columns, int column = 0) {
  return static_cast<size_t>(row) * static_cast<size_t>(columns) + static_cast<size_t>(column);
}

struct Model {
  int kv_heads;
  int group;
  int head_dim;
  int heads() const { return kv_heads * group; }
  KvShape shape() const { return {.layers = 2, .kv_heads = kv_heads, .head_dim = head_dim}; }
};

// A sequence of any length: every value is a function of its place, so that any rows of it can be made anywhere.
struct Source {
  Model model;
  uint64_t seed;
  float query_scale = 1.0f;

  // About normal, variance 1.
  float value_at(uint64_t kind, int head, int position, int dim) const {
    uint64_t x = seed * 0x9e3779b97f4a7c15u + kind;
    for (const int part : {head, position, dim}) {
      x = (x ^ static_cast<uint64_t>(part)) * 0xff51afd7ed558ccdu;
      x ^= x >> 32;
    }
    const auto sum = static_cast<float>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    return (sum / 65535.0f - 2.0f) * 1.7320508f;
  }
  bf16 key(int head, int position, int dim) const { return to_bf16(value_at(1, head, position, dim)); }
  // Some dims are always zero: their sums must not tell how often they were rescaled.
  bf16 value(int head, int position, int dim) const {
    return dim % 11 == 3 ? bf16{static_cast<uint16_t>(position % 2 == 0 ? 0 : 0x8000)}
                         : to_bf16(value_at(2, head, position, dim));
  }
  bf16 query(int head, int position, int dim) const { return to_bf16(query_scale * value_at(3, head, position, dim)); }
};

// Rows of a source as one pass sees them.
struct Piece {
  const Source* source;
  int tail_position;
  int position;
  int rows;
  int end() const { return position + rows; }
};

// How sequences of more than one split are run: cut with all scratch that they want, cut in rounds that use scratch
// anew, one walk over all splits, or as the plan chooses.
enum class Way { cut, rounds, walk, chosen };

struct Setting {
  Way way = Way::chosen;
  uint64_t places = 1;  // where pages lie
};

struct Outcome {
  std::vector<bf16> out;
  std::vector<float> log_sum_exp;
  AttentionPlan plan;
};

float scale_of(const Model& model) {
  return 1.0f / std::sqrt(static_cast<float>(model.head_dim));
}

// Head pages of all pieces in the slots of one arena, in random order, the rest of which is garbage.
class Arena {
 public:
  Arena(const Model& model, const std::vector<Piece>& pieces, uint64_t seed)
      : model_(model), page_values_(2 * kPageTokens * at(model.head_dim, 1)), random_(seed) {
    size_t pages = 5;
    for (const Piece& piece : pieces) {
      pages += at((piece.end() + kPageTokens - 1) / kPageTokens, model.kv_heads);
    }
    values_.resize(pages * page_values_);
    std::minstd_rand garbage(static_cast<unsigned>(seed));
    for (bf16& x : values_) {
      const auto bits = static_cast<uint16_t>(garbage());
      x = {static_cast<uint16_t>((bits & 0x7f80u) == 0x7f80u ? bits ^ 0x80u : bits)};  // any finite value
    }
    free_.resize(pages);
    std::iota(free_.begin(), free_.end(), size_t{0});
    std::shuffle(free_.begin(), free_.end(), random_);
    for (const Piece& piece : pieces) {
      place(piece);
    }
    device_ = std::make_unique<DeviceArray<bf16>>(values_);
    std::vector<std::byte*> pointers;
    for (const size_t slot : slots_) {
      pointers.push_back(reinterpret_cast<std::byte*>(device_->data() + slot * page_values_));
    }
    pointers_ = std::make_unique<DeviceArray<std::byte*>>(pointers);
    tokens_ = std::make_unique<DeviceArray<int>>(token_counts_);
  }

  LayerKv kv(size_t piece, int tail_position) const {
    const Table& table = tables_[piece];
    LayerKv kv;
    kv.past.head_pages = pointers_->data() + table.past;
    kv.past.page_stride = table.past_stride;
    kv.past.tokens = tail_position == 0 ? nullptr : tokens_->data() + table.tokens;
    kv.tail.head_pages = pointers_->data() + table.tail;
    kv.tail.page_stride = table.tail_stride;
    kv.tail_position = tail_position;
    return kv;
  }

 private:
  struct Table {
    size_t past;
    size_t tail;
    size_t tokens;
    int past_stride;
    int tail_stride;
  };

  void place(const Piece& piece) {
    const int pages = (piece.end() + kPageTokens - 1) / kPageTokens;
    const int past_pages = piece.tail_position / kPageTokens;
    Table table{};
    table.past_stride = past_pages + 2;
    table.tail_stride = pages - past_pages + 1;
    table.past = slots_.size();
    slots_.resize(slots_.size() + at(table.past_stride, model_.kv_heads));  // entries that nobody reads: slot 0
    table.tail = slots_.size();
    slots_.resize(slots_.size() + at(table.tail_stride, model_.kv_heads));
    table.tokens = token_counts_.size();
    for (int head = 0; head < model_.kv_heads; ++head) {
      token_counts_.push_back(piece.tail_position);
      for (int page = 0; page < pages; ++page) {
        const size_t slot = free_.back();
        free_.pop_back();
        const size_t entry = page < past_pages ? table.past + at(head, table.past_stride, page)
                                               : table.tail + at(head, table.tail_stride, page - past_pages);
        slots_[entry] = slot;
        write(*piece.source, head, page, std::min(piece.end(), (page + 1) * kPageTokens),
              values_.data() + slot * page_values_);
      }
    }
    tables_.push_back(table);
  }

  void write(const Source& source, int head, int page, int end, bf16* keys) const {
    bf16* values = keys + at(kPageTokens, model_.head_dim);
    for (int t = page * kPageTokens; t < end; ++t) {
      for (int d = 0; d < model_.head_dim; ++d) {
        keys[key_index(t % kPageTokens, d)] = source.key(head, t, d);
        values[value_index(t % kPageTokens, d, model_.head_dim)] = source.value(head, t, d);
      }
    }
  }

  Model model_;
  size_t page_values_;
  std::mt19937_64 random_;
  std::vector<bf16> values_;
  std::vector<size_t> free_;
  std::vector<size_t> slots_;
  std::vector<int> token_counts_;
  std::vector<Table> tables_;
  std::unique_ptr<DeviceArray<bf16>> device_;
  std::unique_ptr<DeviceArray<std::byte*>> pointers_;
  std::unique_ptr<DeviceArray<int>> tokens_;
};

std::vector<bf16> queries(const Model& model, const std::vector<Piece>& pieces) {
  std::vector<bf16> q;
  for (const Piece& piece : pieces) {
    for (int position = piece.position; position < piece.end(); ++position) {
      for (int head = 0; head < model.heads(); ++head) {
        for (int d = 0; d < model.head_dim; ++d) {
          q.push_back(piece.source->query(head, position, d));
        }
      }
    }
  }
  return q;
}

PlanBounds bounds_of(Way way, const Limits& limits) {
  PlanBounds bounds = plan_bounds(limits);
  if (way == Way::chosen) {
    return bounds;
  }
  const size_t stacked = at(limits.max_rows, limits.heads / limits.shape.kv_heads);
  bounds.scratch_rows = way == Way::cut ? 8 * stacked : std::max<size_t>(stacked, 5 * kTileRows);
  bounds.enough_blocks = way == Way::walk ? 0 : INT_MAX;
  return bounds;
}

Outcome run(const Model& model, const std::vector<Piece>& pieces, const Setting& setting = {}) {
  const Arena arena(model, pieces, setting.places);
  // Layer 1 of two; of layer 0 the geometry alone is told.
  std::vector<SequenceRows> sequences(2 * pieces.size());
  PassRows pass{.layers = 2, .sequences = sequences};
  for (size_t i = 0; i < pieces.size(); ++i) {
    SequenceRows rows{.first_row = pass.rows, .rows = pieces[i].rows, .position = pieces[i].position};
    rows.kv.tail_position = pieces[i].tail_position;
    sequences[i] = rows;
    rows.kv = arena.kv(i, pieces[i].tail_position);
    sequences[pieces.size() + i] = rows;
    pass.rows += rows.rows;
  }
  const Limits limits{.shape = model.shape(),
                      .heads = model.heads(),
                      .max_rows = pass.rows,
                      .max_sequences = static_cast<int>(pieces.size()),
                      .max_context_tokens = 8192};
  const PlanBounds bounds = bounds_of(setting.way, limits);
  Outcome outcome;
  plan_attention(pass, limits, bounds, outcome.plan);
  EXPECT_LE(outcome.plan.tiles.size(), max_attention_tiles(limits));
  EXPECT_LE(outcome.plan.combine.size(), max_attention_tiles(limits));

  const DeviceArray<SequenceRows> staged(sequences);
  const DeviceArray<AttentionTile> tiles(outcome.plan.tiles);
  const DeviceArray<AttentionTile> combine(outcome.plan.combine);
  const DeviceArray<bf16> q(queries(model, pieces));
  const DeviceArray<bf16> out(at(pass.rows, model.heads() * model.head_dim));
  const DeviceArray<float> log_sum_exp(at(pass.rows, model.heads()));
  const DeviceArray<float> scratch(bounds.scratch_rows * at(model.kv_heads, state_floats(model.head_dim)));
  const StagedPass staged_pass{.rows = pass.rows, .count = static_cast<int>(pieces.size()), .sequences = staged.data()};
  attention({.shape = model.shape(),
             .heads = model.heads(),
             .scale = scale_of(model),
             .q = q.data(),
             .pass = &pass,
             .layer = 1,
             .out = out.data(),
             .log_sum_exp = log_sum_exp.data()},
            staged_pass, outcome.plan, tiles.data(), combine.data(), scratch.data(), nullptr);
  finish();
  outcome.out = out.read();
  outcome.log_sum_exp = log_sum_exp.read();
  for (const bf16 x : outcome.out) {
    if (x.bits == 0xffff) {
      ADD_FAILURE() << "an output was not written";
      break;
    }
  }
  return outcome;
}

// One row and head against float64; what of the row is checked is its norm-wise error.
void expect_row(const Model& model, const Source& source, int position, int head, const bf16* out, float log_sum_exp) {
  const int kv_head = head / model.group;
  std::vector<double> scores;
  for (int t = 0; t <= position; ++t) {
    double dot = 0;
    for (int d = 0; d < model.head_dim; ++d) {
      dot += double{to_float(source.query(head, position, d))} * to_float(source.key(kv_head, t, d));
    }
    scores.push_back(dot * scale_of(model));
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double& score : scores) {
    score = std::exp(score - top);
    sum += score;
  }
  ASSERT_NEAR(log_sum_exp, top + std::log(sum), 2e-3 + 1e-5 * std::abs(top)) << "position " << position;
  double error = 0;
  double norm = 0;
  double largest = 0;
  for (int d = 0; d < model.head_dim; ++d) {
    double value = 0;
    for (int t = 0; t <= position; ++t) {
      const double v = to_float(source.value(kv_head, t, d));
      value += scores[static_cast<size_t>(t)] / sum * v;
      largest = std::max(largest, std::abs(v));
    }
    const double off = to_float(out[d]) - value;
    error += off * off;
    norm += value * value;
    ASSERT_NEAR(to_float(out[d]), value, largest / 256) << "position " << position << " head " << head << " dim " << d;
  }
  ASSERT_LE(std::sqrt(error), 6e-3 * std::sqrt(norm) + 1e-6) << "position " << position << " head " << head;
}

void expect_float64(const Model& model, const std::vector<Piece>& pieces, const Outcome& outcome, int stride = 1) {
  int first_row = 0;
  for (const Piece& piece : pieces) {
    for (const int row : {0, piece.rows / 3, piece.rows - 1}) {
      for (int head = 0; head < model.heads(); head += stride) {
        const size_t query = at(first_row + row, model.heads(), head);
        expect_row(model, *piece.source, piece.position + row, head, outcome.out.data() + query * at(model.head_dim, 1),
                   outcome.log_sum_exp[query]);
        if (testing::Test::HasFatalFailure()) {
          return;
        }
      }
    }
    first_row += piece.rows;
  }
}

// Rows [from, from + rows) of one outcome and [other_from, ...) of another, bit by bit.
void expect_same_bits(const Model& model, const Outcome& a, int from, const Outcome& b, int other_from, int rows) {
  const int width = model.heads() * model.head_dim;
  for (int row = 0; row < rows; ++row) {
    ASSERT_EQ(std::memcmp(a.out.data() + at(from + row, width), b.out.data() + at(other_from + row, width),
                          at(width, sizeof(bf16))),
              0)
        << "row " << row;
    ASSERT_EQ(std::memcmp(a.log_sum_exp.data() + at(from + row, model.heads()),
                          b.log_sum_exp.data() + at(other_from + row, model.heads()), at(model.heads(), sizeof(float))),
              0)
        << "row " << row;
  }
}

int rows_of(const std::vector<Piece>& pieces) {
  return std::accumulate(pieces.begin(), pieces.end(), 0, [](int n, const Piece& piece) { return n + piece.rows; });
}

TEST(CudaAttention, HeadSizesAndGroupsMatchFloat64) {
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const int group : {1, 2, 4, 7}) {
      const Model model{2, group, head_dim};
      const Source source{model, static_cast<uint64_t>(head_dim + group)};
      const std::vector<Piece> pieces{{&source, 0, 0, 1}, {&source, 128, 150, 21}, {&source, 1088, 1090, 1}};
      expect_float64(model, pieces, run(model, pieces), 3);
      ASSERT_FALSE(HasFatalFailure()) << "head_dim " << head_dim << " group " << group;
    }
  }
}

TEST(CudaAttention, EveryClassOfTilesMatchesFloat64) {
  const Model model{1, 4, 128};
  const Source source{model, 3};
  for (const int rows : {1, 4, 5, 8, 9, 16, 17, 31, 32, 33, 100, 300}) {
    for (const int position : {0, 1000, 2047}) {
      for (const Way way : {Way::cut, Way::walk}) {
        const std::vector<Piece> pieces{{&source, position / 64 * 64, position, rows}};
        expect_float64(model, pieces, run(model, pieces, {.way = way}), 2);
        ASSERT_FALSE(HasFatalFailure()) << "rows " << rows << " position " << position;
      }
    }
  }
}

TEST(CudaAttention, RandomBatchesMatchFloat64) {
  std::mt19937_64 random(5);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  for (int i = 0; i < 24; ++i) {
    const Model model{1 + below(3), std::vector{1, 2, 4, 7}[static_cast<size_t>(below(4))], 32 * (1 + below(4))};
    const Source source{model, random(), i % 5 == 3 ? 12.0f : 1.0f};
    std::vector<Piece> pieces;
    for (int n = 1 + below(4); n > 0; --n) {
      const int position = below(n == 1 ? 5000 : 900);
      pieces.push_back({&source, below(position / 64 + 1) * 64, position, 1 + below(n % 2 == 0 ? 3 : 200)});
    }
    const Setting setting{.way = static_cast<Way>(i % 4), .places = random()};
    expect_float64(model, pieces, run(model, pieces, setting), 5);
    ASSERT_FALSE(HasFatalFailure()) << "case " << i;
  }
}

TEST(CudaAttention, CutAndWalkedSequencesHaveTheSameBits) {
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const float query_scale : {1.0f, 60.0f}) {  // the second: later splits and pages push earlier ones to nothing
      const Model model{2, 4, head_dim};
      const Source source{model, static_cast<uint64_t>(head_dim), query_scale};
      const std::vector<Piece> pieces{{&source, 4032, 4090, 1}, {&source, 2048, 2048, 1},  {&source, 1984, 2030, 40},
                                      {&source, 960, 1000, 90}, {&source, 3008, 3060, 12}, {&source, 64, 100, 5}};
      const Outcome cut = run(model, pieces, {.way = Way::cut});
      const Outcome rounds = run(model, pieces, {.way = Way::rounds, .places = 7});
      const Outcome walked = run(model, pieces, {.way = Way::walk, .places = 8});
      ASSERT_TRUE(walked.plan.combine.empty());
      ASSERT_GT(cut.plan.combine.size(), pieces.size() - 1);
      ASSERT_EQ(cut.plan.tiles.back().round, 0);
      ASSERT_GT(rounds.plan.tiles.back().round, 0);
      expect_same_bits(model, cut, 0, walked, 0, rows_of(pieces));
      expect_same_bits(model, cut, 0, rounds, 0, rows_of(pieces));
      ASSERT_FALSE(HasFatalFailure()) << "head_dim " << head_dim << " scale " << query_scale;
    }
  }
}

TEST(CudaAttention, ChunkingLeavesBitsAlone) {
  std::mt19937_64 random(6);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  for (const Model model : {Model{2, 4, 128}, Model{1, 7, 64}, Model{3, 1, 96}, Model{2, 2, 32}}) {
    const Source source{model, 77, model.head_dim == 64 ? 40.0f : 1.0f};
    const int tokens = 2300;
    const Outcome whole = run(model, {{&source, 0, 0, tokens}}, {.way = Way::walk});
    for (const int longest : {700, 130, 40}) {
      for (int position = 0, cuts = 0; position < tokens && cuts < 12; ++cuts) {
        const int rows = std::min(tokens - position, 1 + below(longest));
        const Piece piece{&source, below(position / 64 + 1) * 64, position, rows};
        const Setting setting{.way = static_cast<Way>(cuts % 4), .places = random()};
        expect_same_bits(model, whole, position, run(model, {piece}, setting), 0, rows);
        ASSERT_FALSE(HasFatalFailure()) << "head_dim " << model.head_dim << " position " << position;
        position = longest == 700 ? position + rows : below(tokens);
      }
    }
  }
}

TEST(CudaAttention, SingleRowsBesideOthersHaveTheBitsOfThePrompt) {
  const Model model{2, 4, 128};
  const Source source{model, 9};
  const Source other{model, 10, 5.0f};
  const Outcome whole = run(model, {{&source, 0, 0, 2100}});
  std::vector<Piece> pieces;
  const std::vector<int> positions{0, 1, 63, 64, 65, 1022, 1023, 1024, 1025, 1087, 1088, 2047, 2048, 2099};
  for (const int position : positions) {
    pieces.push_back({&source, position / 64 * 64, position, 1});
    pieces.push_back({&other, 0, 3 * position / 2, 1 + position % 37});
  }
  for (const Way way : {Way::cut, Way::rounds, Way::walk}) {
    const Outcome batch = run(model, pieces, {.way = way, .places = 3});
    int row = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (pieces[i].source == &source) {
        expect_same_bits(model, whole, pieces[i].position, batch, row, 1);
        ASSERT_FALSE(HasFatalFailure()) << "position " << pieces[i].position << " way " << static_cast<int>(way);
      }
      row += pieces[i].rows;
    }
  }
}

TEST(CudaAttention, TheBorderOfTheTailAndThePlacesOfPagesLeaveBitsAlone) {
  const Model model{2, 2, 64};
  const Source source{model, 12};
  const Outcome first = run(model, {{&source, 1472, 1500, 30}});
  for (int tail_position = 0; tail_position <= 1472; tail_position += 64) {
    const Setting setting{.way = static_cast<Way>(tail_position / 64 % 4),
                          .places = static_cast<uint64_t>(tail_position)};
    expect_same_bits(model, first, 0, run(model, {{&source, tail_position, 1500, 30}}, setting), 0, 30);
    ASSERT_FALSE(HasFatalFailure()) << "tail_position " << tail_position;
  }
}

// Every row stands once in every split that it sees, scratch is used by one tile at a time, and the cut tiles are
// combined. Host arithmetic: no device is needed.
void expect_covered(const AttentionPlan& plan, const std::vector<SequenceRows>& sequences, int group,
                    size_t scratch_rows) {
  using Place = std::array<int, 4>;  // sequence, row, split; of scratch: round, row
  std::set<Place> seen;
  std::set<Place> taken;
  std::set<Place> combined;
  std::tuple<int, int> last{0, -tile_class(kTileRows)};
  for (const AttentionTile& tile : plan.combine) {
    combined.insert({tile.sequence, tile.first, tile.rows, tile.partial});
  }
  ASSERT_EQ(combined.size(), plan.combine.size());
  ASSERT_TRUE(std::is_sorted(plan.combine.begin(), plan.combine.end(),
                             [](const auto& a, const auto& b) { return a.round < b.round; }));
  for (const AttentionTile& tile : plan.tiles) {
    ASSERT_LE(last, std::tuple(tile.round, -tile_class(tile.rows)));
    last = {tile.round, -tile_class(tile.rows)};
    ASSERT_EQ(combined.count({tile.sequence, tile.first, tile.rows, tile.partial}), tile.split < 0 ? 0u : 1u);
    const SequenceRows& rows = sequences[static_cast<size_t>(tile.sequence)];
    for (int row = 0; row < tile.rows; ++row) {
      const int splits = (rows.position + (tile.first + row) / group) / kSplitTokens + 1;
      if (tile.split >= 0 || splits > 1) {
        const int place = tile.partial + std::max(tile.split, 0) * tile.rows + row;
        ASSERT_LT(static_cast<size_t>(place), scratch_rows);
        ASSERT_TRUE(taken.insert({tile.round, place, 0, 0}).second);
      }
      for (int split = tile.split < 0 ? 0 : tile.split; split < splits; ++split) {
        ASSERT_TRUE(seen.insert({tile.sequence, tile.first + row, split, 0}).second);
        if (tile.split >= 0) {
          break;
        }
      }
    }
  }
  size_t expected = 0;
  for (const SequenceRows& rows : sequences) {
    for (int row = 0; row < rows.rows; ++row) {
      expected += at(group, (rows.position + row) / kSplitTokens + 1);
    }
  }
  ASSERT_EQ(seen.size(), expected);
}

TEST(CudaAttentionPlan, CoversEveryRowWithinScratch) {
  std::mt19937_64 random(15);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  for (int i = 0; i < 60; ++i) {
    const Model model{1 + below(8), 1 + below(16), 32 * (1 + below(4))};
    std::vector<SequenceRows> sequences;
    PassRows pass{.layers = 1};
    for (int n = 1 + below(20); n > 0; --n) {
      const int rows = 1 + below(std::vector{1, 40, 700}[static_cast<size_t>(below(3))]);
      sequences.push_back({.first_row = pass.rows, .rows = rows, .position = below(40000)});
      pass.rows += rows;
    }
    pass.sequences = sequences;
    const Limits limits{model.shape(), model.heads(), pass.rows + below(100), 20, 1 << below(18)};
    PlanBounds bounds = plan_bounds(limits);
    if (i % 3 == 0) {
      bounds.scratch_rows = at(pass.rows, model.group) + static_cast<size_t>(below(5000));
      bounds.enough_blocks = i % 2 == 0 ? INT_MAX : below(200);
    }
    AttentionPlan plan;
    plan_attention(pass, limits, bounds, plan);
    expect_covered(plan, sequences, model.group, bounds.scratch_rows);
    ASSERT_LE(std::max(plan.tiles.size(), plan.combine.size()), max_attention_tiles(limits));
    ASSERT_FALSE(HasFatalFailure()) << "case " << i;
  }
}

}  // namespace
}  // namespace vericache::cuda
