// Exact attention over full KV. A block takes up to 128 stacked rows of one sequence and one KV head and walks either
// one split, whose results a second kernel folds, or all of them; a warp owns 16 or 32 of the rows and shares no sum.
#include <algorithm>
#include <span>

#include "backend/cuda/attention_plan.h"
#include "backend/cuda/attention_tile.cuh"
#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kCombineRows = 8;  // of a block
constexpr float kLog2E = 1.44269504f;

struct TileArgs {
  const AttentionTile* tiles = nullptr;
  const SequenceRows* sequences = nullptr;
  const bf16* q = nullptr;
  bf16* out = nullptr;
  float* log_sum_exp = nullptr;
  float* scratch = nullptr;
  int heads = 0;
  int kv_heads = 0;
  int group = 0;    // query heads of a KV head
  float scale = 0;  // of scores, in powers of two
};

// One row of one query head, counted over the pass.
__device__ __forceinline__ size_t query_row(const TileArgs& args, const SequenceRows& sequence, int head, int stacked) {
  return static_cast<size_t>(sequence.first_row + stacked / args.group) * static_cast<size_t>(args.heads) +
         static_cast<size_t>(head * args.group + stacked % args.group);
}

template <int HeadDim>
__device__ __forceinline__ float* state_of(const TileArgs& args, int scratch_row, int head) {
  return args.scratch +
         (static_cast<size_t>(scratch_row) * static_cast<size_t>(args.kv_heads) + static_cast<size_t>(head)) *
             state_floats(HeadDim);
}

// What one block does.
struct BlockTile {
  AttentionTile tile;
  const SequenceRows* sequence;
  int head;  // KV head
  int group;
  int first_page;
  int end_page;

  __device__ explicit BlockTile(const TileArgs& args)
      : tile(args.tiles[blockIdx.x / static_cast<unsigned>(args.kv_heads)]),
        sequence(args.sequences + tile.sequence),
        head(static_cast<int>(blockIdx.x % static_cast<unsigned>(args.kv_heads))),
        group(args.group),
        first_page(max(tile.split, 0) * kSplitPages),
        end_page(position_of(tile.rows - 1) / kPageTokens + 1) {
    if (tile.split >= 0) {
      end_page = min(end_page, first_page + kSplitPages);
    }
  }
  // Rows behind the tile's last stand for the last: they compute what nobody writes.
  __device__ int stacked(int row) const { return tile.first + min(row, tile.rows - 1); }
  __device__ int position_of(int row) const { return sequence->position + stacked(row) / group; }
  __device__ BlockWalk walk() const {
    const LayerKv& kv = sequence->kv;
    return {kv.past.head_pages + static_cast<ptrdiff_t>(head) * kv.past.page_stride,
            kv.tail.head_pages + static_cast<ptrdiff_t>(head) * kv.tail.page_stride, kv.tail_position / kPageTokens,
            first_page, end_page - first_page};
  }
};

// A warp's rows, as it will read them: the queries in the order of score_page, the positions.
template <int HeadDim, int MTiles>
__device__ void load_rows(const TileArgs& args, const BlockTile& block, int first_row, std::byte* queries,
                          int* positions) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int m = 0; m < MTiles; ++m) {
    const int row = first_row + 16 * m + lane / 4;
    const bf16* low = args.q + query_row(args, *block.sequence, block.head, block.stacked(row)) * HeadDim;
    const bf16* high = args.q + query_row(args, *block.sequence, block.head, block.stacked(row + 8)) * HeadDim;
    for (int dims = 0; dims < HeadDim / 32; ++dims) {
      const uint4 a = *reinterpret_cast<const uint4*>(low + 32 * dims + 8 * (lane % 4));
      const uint4 b = *reinterpret_cast<const uint4*>(high + 32 * dims + 8 * (lane % 4));
      *reinterpret_cast<uint4*>(queries + query_offset<MTiles>(dims, 0, m, lane)) = {a.x, b.x, a.y, b.y};
      *reinterpret_cast<uint4*>(queries + query_offset<MTiles>(dims, 1, m, lane)) = {a.z, b.z, a.w, b.w};
    }
  }
  if (lane < 16 * MTiles) {
    positions[lane] = block.position_of(first_row + lane);
  }
  __syncwarp();
}

// Folds the total that stands in scratch and the split's state; the whole warp. Rows that no one holds read nothing.
template <int HeadDim, int MTiles>
__device__ __forceinline__ void fold_row(WarpRows<HeadDim, MTiles>& rows, int m, int half, const float* state,
                                         bool total_stands) {
  const int dim = static_cast<int>(threadIdx.x % 4) * 2;
  const float2 total = total_stands ? *reinterpret_cast<const float2*>(state + HeadDim) : float2{-kInfinity, 0.0f};
  const Fold f = fold(total.x, rows.top[m][half]);
  rows.top[m][half] = f.top;
  rows.sum[m][half] = folded(f, total.y, rows.sum[m][half]);
#pragma unroll
  for (int t = 0; t < HeadDim / 8; ++t) {
    const float2 values = total_stands ? *reinterpret_cast<const float2*>(state + 8 * t + dim) : float2{0.0f, 0.0f};
    rows.acc[m][t][2 * half] = folded(f, values.x, rows.acc[m][t][2 * half]);
    rows.acc[m][t][2 * half + 1] = folded(f, values.y, rows.acc[m][t][2 * half + 1]);
  }
}

template <int HeadDim, int MTiles>
__device__ __forceinline__ void write_state(const WarpRows<HeadDim, MTiles>& rows, int m, int half, float* state) {
  const int dim = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int t = 0; t < HeadDim / 8; ++t) {
    *reinterpret_cast<float2*>(state + 8 * t + dim) = {rows.acc[m][t][2 * half], rows.acc[m][t][2 * half + 1]};
  }
  if (dim == 0) {
    *reinterpret_cast<float2*>(state + HeadDim) = {rows.top[m][half], rows.sum[m][half]};
  }
}

template <int HeadDim, int MTiles>
__device__ __forceinline__ void write_result(const TileArgs& args, const WarpRows<HeadDim, MTiles>& rows, int m,
                                             int half, size_t query) {
  const int dim = static_cast<int>(threadIdx.x % 4) * 2;
  const float inverse = __frcp_rn(rows.sum[m][half]);
  bf16* out = args.out + query * HeadDim + dim;
#pragma unroll
  for (int t = 0; t < HeadDim / 8; ++t) {
    *reinterpret_cast<uint32_t*>(out + 8 * t) =
        pack_pair(divided(rows.acc[m][t][2 * half], inverse), divided(rows.acc[m][t][2 * half + 1], inverse));
  }
  if (dim == 0 && args.log_sum_exp != nullptr) {
    args.log_sum_exp[query] = log_sum_exp_of(rows.top[m][half], rows.sum[m][half]);
  }
}

// What becomes of a split's state: a partial result in scratch, or a part of the total, which stands in scratch between
// the splits of a walk and leaves it behind the last.
template <int HeadDim, int MTiles>
__device__ __forceinline__ void end_split(const TileArgs& args, int first_row, int end_page,
                                          WarpRows<HeadDim, MTiles>& rows) {
  const BlockTile block(args);
  const int split = (end_page - 1) / kSplitPages;
  const bool alone = block.tile.split >= 0;
  const bool last = end_page == block.end_page;
  const int scratch_row = block.tile.partial + (alone ? split * block.tile.rows : 0);
  rows.add_lanes();
#pragma unroll
  for (int m = 0; m < MTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half + static_cast<int>(threadIdx.x % 32 / 4);
      const bool held = row < block.tile.rows;
      float* state = state_of<HeadDim>(args, scratch_row + (held ? row : 0), block.head);
      if (!alone) {
        fold_row(rows, m, half, state, held && split > 0);
      }
      __syncwarp();  // four lanes have read a row's maximum and sum, one of them replaces it
      if (held && !alone && last) {
        write_result(args, rows, m, half, query_row(args, *block.sequence, block.head, block.stacked(row)));
      } else if (held) {
        write_state(rows, m, half, state);
      }
    }
  }
}

// What a block keeps in shared memory.
template <int HeadDim, int Warps, int MTiles>
struct TileMemory {
  using Ring = PartRing<HeadDim, Warps>;
  std::byte slots[Ring::kBytes];
  std::byte queries[Warps][16 * MTiles * HeadDim * 2];
  int positions[Warps][16 * MTiles];
  typename Ring::Control control;
};

template <int HeadDim, int Warps, int MTiles, int Blocks>
__global__ void __launch_bounds__(Warps * 32, Blocks) attention_kernel(const TileArgs args) {
  using Memory = TileMemory<HeadDim, Warps, MTiles>;
  extern __shared__ __align__(128) std::byte shared[];
  Memory& memory = *reinterpret_cast<Memory*>(shared);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int first_row = warp * 16 * MTiles;
  const BlockTile block(args);
  typename Memory::Ring ring(memory.slots, &memory.control, block.walk());
  load_rows<HeadDim, MTiles>(args, block, first_row, memory.queries[warp], memory.positions[warp]);

  const int first_page = block.first_page;
  const int end_page = block.end_page;
  const int first_position = memory.positions[warp][0];
  const int last_position = first_row < block.tile.rows ? memory.positions[warp][16 * MTiles - 1] : -1;
  WarpRows<HeadDim, MTiles> rows;
  for (int page = first_page; page < end_page;) {
    const int split_end = min(end_page, (page / kSplitPages + 1) * kSplitPages);
    rows.start_split();
    for (; page < split_end; ++page) {
      const unsigned part = 2 * static_cast<unsigned>(page - first_page);
      const int first_token = page * kPageTokens;
      const bool seen = first_token <= last_position;
      uint32_t weights[MTiles][8][2];
      const std::byte* keys = ring.acquire(part);
      if (seen) {
        float scores[MTiles][8][4];
        score_page<HeadDim, MTiles>(memory.queries[warp], keys, lane, scores);
        ring.release(part);
        if (first_token + kPageTokens - 1 > first_position) {
          rows.hide_unseen(scores, memory.positions[warp], first_token, lane);
        }
        rows.weigh(scores, args.scale, weights);
      } else {
        ring.release(part);
      }
      const std::byte* values = ring.acquire(part + 1);
      if (seen) {
        add_values<HeadDim, MTiles>(weights, values, lane, rows.acc);
      }
      ring.release(part + 1);
    }
    if (last_position >= 0) {
      end_split(args, first_row, page, rows);
    }
  }
}

// The splits of tiles that were cut, folded left to right: a row a warp.
template <int HeadDim>
__global__ void __launch_bounds__(kCombineRows * 32) combine_kernel(const TileArgs args) {
  constexpr int kValues = HeadDim / 32;  // of a lane: dims lane, lane + 32, ...
  constexpr int kAhead = 8;              // splits that are on their way at a time
  const AttentionTile tile = args.tiles[blockIdx.x / static_cast<unsigned>(args.kv_heads)];
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.kv_heads));
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.y * kCombineRows + threadIdx.x / 32);
  if (row >= tile.rows) {
    return;
  }
  const SequenceRows& sequence = args.sequences[tile.sequence];
  const int stacked = tile.first + row;
  const int splits = (sequence.position + stacked / args.group) / kSplitTokens + 1;
  float top = -kInfinity;
  float sum = 0.0f;
  float values[kValues] = {};
  for (int first = 0; first < splits; first += kAhead) {
    const int count = min(kAhead, splits - first);
    float2 states[kAhead];
    float parts[kAhead][kValues];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) {
        const float* state = state_of<HeadDim>(args, tile.partial + (first + i) * tile.rows + row, head);
        states[i] = *reinterpret_cast<const float2*>(state + HeadDim);
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
          parts[i][v] = state[32 * v + lane];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < count) {
        const Fold f = fold(top, states[i].x);
        top = f.top;
        sum = folded(f, sum, states[i].y);
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
          values[v] = folded(f, values[v], parts[i][v]);
        }
      }
    }
  }
  const size_t query = query_row(args, sequence, head, stacked);
  const float inverse = __frcp_rn(sum);
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    args.out[query * HeadDim + 32 * v + lane].bits =
        static_cast<uint16_t>(pack_pair(divided(values[v], inverse), 0.0f) & 0xffffu);
  }
  if (lane == 0 && args.log_sum_exp != nullptr) {
    args.log_sum_exp[query] = log_sum_exp_of(top, sum);
  }
}

template <int HeadDim, int Class>
void launch_tiles(const TileArgs& args, int tiles, cudaStream_t stream) {
  constexpr TileClass kClass = kTileClasses[Class];
  constexpr int kBytes = sizeof(TileMemory<HeadDim, kClass.warps, kClass.m_tiles>);
  auto* kernel = attention_kernel<HeadDim, kClass.warps, kClass.m_tiles, kClass.blocks>;
  allow_shared(kernel, kBytes, "attention");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), "attention");
  kernel<<<static_cast<unsigned>(tiles) * static_cast<unsigned>(args.kv_heads), kClass.warps * 32, kBytes, stream>>>(
      args);
  check_cuda(cudaGetLastError(), "attention");
}

template <int HeadDim>
void launch_combine(const TileArgs& args, std::span<const AttentionTile> tiles, cudaStream_t stream) {
  int rows = 0;
  for (const AttentionTile& tile : tiles) {
    rows = std::max(rows, tile.rows);
  }
  const dim3 grid(static_cast<unsigned>(tiles.size()) * static_cast<unsigned>(args.kv_heads),
                  static_cast<unsigned>((rows + kCombineRows - 1) / kCombineRows));
  combine_kernel<HeadDim><<<grid, kCombineRows * 32, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "attention");
}

// The first of `tiles` that belong together by `key`.
template <typename Key>
std::span<const AttentionTile> first_run(std::span<const AttentionTile> tiles, const Key& key) {
  const auto end = std::partition_point(tiles.begin(), tiles.end(),
                                        [&](const AttentionTile& tile) { return key(tile) == key(tiles.front()); });
  return tiles.first(static_cast<size_t>(end - tiles.begin()));
}

template <int HeadDim>
void launch(TileArgs args, const AttentionPlan& plan, const AttentionTile* device_tiles,
            const AttentionTile* device_combine, cudaStream_t stream) {
  const auto round_of = [](const AttentionTile& tile) { return tile.round; };
  const auto class_of = [](const AttentionTile& tile) { return tile_class(tile.rows); };
  constexpr decltype(&launch_tiles<HeadDim, 0>) kLaunch[] = {launch_tiles<HeadDim, 0>, launch_tiles<HeadDim, 1>,
                                                             launch_tiles<HeadDim, 2>, launch_tiles<HeadDim, 3>};
  std::span<const AttentionTile> tiles = plan.tiles;
  std::span<const AttentionTile> combine = plan.combine;
  while (!tiles.empty()) {
    auto round = first_run(tiles, round_of);
    tiles = tiles.subspan(round.size());
    const int index = round.front().round;
    while (!round.empty()) {
      const auto run = first_run(round, class_of);
      args.tiles = device_tiles + (run.data() - plan.tiles.data());
      kLaunch[class_of(run.front())](args, static_cast<int>(run.size()), stream);
      round = round.subspan(run.size());
    }
    if (!combine.empty() && combine.front().round == index) {
      const auto run = first_run(combine, round_of);
      args.tiles = device_combine + (run.data() - plan.combine.data());
      launch_combine<HeadDim>(args, run, stream);
      combine = combine.subspan(run.size());
    }
  }
}

}  // namespace

void attention(const AttentionArgs& args, const StagedPass& pass, const AttentionPlan& plan,
               const AttentionTile* device_tiles, const AttentionTile* device_combine, float* scratch,
               cudaStream_t stream) {
  const KvShape& shape = args.shape;
  check(args.heads % shape.kv_heads == 0, "query heads are shared evenly by the KV heads");
  check(args.scale > 0, "a masked score stays below all others");
  const TileArgs tiles{.sequences = pass.layer(args.layer),
                       .q = args.q,
                       .out = args.out,
                       .log_sum_exp = args.log_sum_exp,
                       .scratch = scratch,
                       .heads = args.heads,
                       .kv_heads = shape.kv_heads,
                       .group = args.heads / shape.kv_heads,
                       .scale = args.scale * kLog2E};
  // These dims are multiples of 32: out has no padding columns, and keys none either.
  for_head_dim(shape.head_dim,
               [&](auto dim) { launch<decltype(dim)::kValue>(tiles, plan, device_tiles, device_combine, stream); });
}

}  // namespace vericache::cuda
