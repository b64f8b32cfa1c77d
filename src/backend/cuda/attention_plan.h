// What the plan of exact attention and its kernels share: splits, classes of tiles, states in scratch. Host and device
// code; pure.
#pragma once

#include "backend/cuda/layout.h"
#include "backend/cuda/ops.h"

namespace vericache::cuda {

// KV is cut at absolute positions into splits of 1,024 tokens. Each is reduced alone, page after page, and the splits
// are folded left to right, whether one block walks them all or every block takes one.
inline constexpr int kSplitPages = 16;
inline constexpr int kSplitTokens = kSplitPages * kPageTokens;

// How a tile of up to so many stacked rows runs. Two 16-row tiles a warp halve what is read from shared memory per
// product, one leaves more warps to hide latency.
struct TileClass {
  int rows;
  int warps;
  int m_tiles;  // of 16 rows, of a warp
  int blocks;   // of a multiprocessor, at least
};
inline constexpr TileClass kTileClasses[] = {{16, 1, 1, 3}, {32, 2, 1, 3}, {64, 4, 1, 2}, {128, 4, 2, 2}};
inline constexpr int kTileRows = 128;

inline int tile_class(int rows) {
  int index = 0;
  while (kTileClasses[index].rows < rows) {
    ++index;
  }
  return index;
}

// A stacked row's state in scratch: values, maximum, sum. Padded, so that every row begins a sector.
VERICACHE_BOTH constexpr int state_floats(int head_dim) {
  return head_dim + 8;
}

// What plan_attention chooses by.
struct PlanBounds {
  size_t scratch_rows = 0;  // of a KV head; all stacked rows of a pass at least
  int enough_blocks = 0;    // a sequence with so many tiles and KV heads keeps the GPU busy without being cut
};
PlanBounds plan_bounds(const Limits& limits);
void plan_attention(const PassRows& pass, const Limits& limits, const PlanBounds& bounds, AttentionPlan& plan);

}  // namespace vericache::cuda
