// The plan of a pass of exact attention: which stacked rows stand in a tile, which tiles are cut into splits, what
// scratch that takes. Host code.
#include "backend/cuda/attention_plan.h"

#include <algorithm>
#include <tuple>

#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr size_t kScratchBytes = size_t{64} << 20;
// More than half of the places of two blocks on each of an H100's or H200's 132 multiprocessors.
constexpr int kEnoughBlocks = 160;

int group_of(const Limits& limits) {
  return limits.heads / limits.shape.kv_heads;
}
int splits_of(int tokens) {
  return (tokens + kSplitTokens - 1) / kSplitTokens;
}
size_t stacked_rows(const Limits& limits) {
  return static_cast<size_t>(limits.max_rows) * static_cast<size_t>(group_of(limits));
}
size_t row_bytes(const Limits& limits) {
  return static_cast<size_t>(limits.shape.kv_heads) * static_cast<size_t>(state_floats(limits.shape.head_dim)) *
         sizeof(float);
}

// Places tiles in scratch, round after round.
class Planner {
 public:
  Planner(const PassRows& pass, const Limits& limits, const PlanBounds& bounds, AttentionPlan& plan)
      : sequences_(pass.layer(0)),
        group_(group_of(limits)),
        kv_heads_(limits.shape.kv_heads),
        most_splits_(splits_of(limits.max_context_tokens)),
        bounds_(bounds),
        plan_(plan) {}

  int sequences() const { return static_cast<int>(sequences_.size()); }
  // The tiles of a sequence are of about the same size, so that they run in one class.
  int tile_rows(int sequence) const {
    const int stacked = sequences_[static_cast<size_t>(sequence)].rows * group_;
    const int tiles = (stacked + kTileRows - 1) / kTileRows;
    return tiles == 0 ? 0 : (stacked + tiles - 1) / tiles;
  }

  void add(int sequence) {
    const SequenceRows& rows = sequences_[static_cast<size_t>(sequence)];
    const int stacked = rows.rows * group_;
    const int most = tile_rows(sequence);
    const int splits = splits_of(rows.position + rows.rows);
    const int blocks = (stacked + most - 1) / most * kv_heads_;
    const bool cut = splits > 1 && splits <= most_splits_ && blocks < bounds_.enough_blocks &&
                     static_cast<size_t>(most) * static_cast<size_t>(splits) <= bounds_.scratch_rows;
    if (!cut && splits > 1) {
      reserve(stacked);
    }
    for (int first = 0; first < stacked; first += most) {
      AttentionTile tile{.sequence = sequence, .first = first, .rows = std::min(most, stacked - first)};
      if (cut) {
        add_cut(tile, splits_of(rows.position + (first + tile.rows - 1) / group_ + 1));
      } else {
        tile.partial = splits > 1 ? used_ - stacked + first : 0;
        tile.round = round_;
        plan_.tiles.push_back(tile);
      }
    }
  }

  // A launch takes the tiles of one round and class; the longest walks go first, and tiles that read the same pages
  // together.
  auto order(const AttentionTile& tile) const {
    const SequenceRows& rows = sequences_[static_cast<size_t>(tile.sequence)];
    const int tokens = rows.position + (tile.first + tile.rows - 1) / group_ - std::max(tile.split, 0) * kSplitTokens;
    return std::tuple(tile.round, -tile_class(tile.rows), tile.split < 0 ? -tokens : -std::min(tokens, kSplitTokens),
                      tile.sequence, tile.split, tile.first);
  }

 private:
  void add_cut(AttentionTile tile, int splits) {
    reserve(tile.rows * splits);
    tile.partial = used_ - tile.rows * splits;
    tile.round = round_;
    plan_.combine.push_back(tile);
    for (tile.split = 0; tile.split < splits; ++tile.split) {
      plan_.tiles.push_back(tile);
    }
  }
  void reserve(int rows) {
    if (static_cast<size_t>(used_) + static_cast<size_t>(rows) > bounds_.scratch_rows) {
      ++round_;
      used_ = 0;
    }
    used_ += rows;
  }

  std::span<const SequenceRows> sequences_;
  int group_;
  int kv_heads_;
  int most_splits_;
  const PlanBounds& bounds_;
  AttentionPlan& plan_;
  int used_ = 0;  // rows of scratch in this round
  int round_ = 0;
};

}  // namespace

PlanBounds plan_bounds(const Limits& limits) {
  const size_t splits = static_cast<size_t>(splits_of(limits.max_context_tokens));
  const size_t affordable = std::max(kScratchBytes / row_bytes(limits), kTileRows * splits);
  return {.scratch_rows = std::max(stacked_rows(limits), std::min(stacked_rows(limits) * splits, affordable)),
          .enough_blocks = kEnoughBlocks};
}

size_t attention_scratch_bytes(const Limits& limits) {
  return plan_bounds(limits).scratch_rows * row_bytes(limits);
}

size_t max_attention_tiles(const Limits& limits) {
  const size_t splits = static_cast<size_t>(std::max(1, splits_of(limits.max_context_tokens)));
  return (static_cast<size_t>(limits.max_sequences) + stacked_rows(limits) / kTileRows) * splits;
}

void plan_attention(const PassRows& pass, const Limits& limits, AttentionPlan& plan) {
  plan_attention(pass, limits, plan_bounds(limits), plan);
}

void plan_attention(const PassRows& pass, const Limits& limits, const PlanBounds& bounds, AttentionPlan& plan) {
  check(pass.rows <= limits.max_rows, "a pass has no more rows than its limits");
  plan.tiles.clear();
  plan.combine.clear();
  Planner planner(pass, limits, bounds, plan);
  for (const TileClass& tiles : kTileClasses) {
    for (int i = 0; i < planner.sequences(); ++i) {
      const int rows = planner.tile_rows(i);
      if (rows > 0 && &kTileClasses[tile_class(rows)] == &tiles) {
        planner.add(i);
      }
    }
  }
  std::sort(plan.tiles.begin(), plan.tiles.end(),
            [&](const AttentionTile& a, const AttentionTile& b) { return planner.order(a) < planner.order(b); });
}

}  // namespace vericache::cuda
