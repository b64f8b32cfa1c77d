// Attention mass of every token under the last query rows of a sequence.
// A warp takes 32 tokens of one KV head, whose keys stay in its registers, and meets the rows with their query heads 8
// at a time, in rising order.
#include <cuda_runtime.h>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/key_tile.cuh"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlockTokens = kWarps * kTileTokens;
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = 256;  // whose places in the ring are found at once
constexpr float kLog2E = 1.44269504f;

// A query head of a row. What no row stands for sees nothing.
struct Column {
  int slot;  // (slot, head) of the ring, as one index
  int position;
  float log2_sum;  // log2 of the softmax denominator
};

__device__ inline Column find_column(const MassArgs& args, int kv_head, int group, int column) {
  if (column >= args.rows * group) {
    return {0, -1, 0.0f};
  }
  const int row = column / group;
  const int place = (args.position + row - args.queries.origin) % args.queries.capacity;
  const int slot = place * args.heads + kv_head * group + column % group;
  return {slot, args.position + row, args.queries.log_sum_exp[slot] * kLog2E};
}

__device__ __forceinline__ float join(MassOf of, float held, float more) {
  return of == MassOf::largest ? fmaxf(held, more) : held + more;
}

template <int kHeadDim, MassOf kOf>
struct Tokens : KeyTile<kHeadDim> {
  using Tile = KeyTile<kHeadDim>;
  float mass[4] = {};  // of token 8 i + g, from the columns 2 c and 2 c + 1 of every eight

  // Eight columns, whose queries lie in q: (slot, head_dim).
  __device__ void meet(const Column* columns, const bf16* q, float scale_log2) {
    float scores[2][4] = {};
    Tile::products(q + static_cast<size_t>(columns[Tile::g].slot) * kHeadDim, scores);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Column& column = columns[2 * Tile::c + n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_approx(fmaf(scores[i / 2][i % 2 * 2 + n], scale_log2, -column.log2_sum));
        mass[i] = join(kOf, mass[i], Tile::token(i) <= column.position ? weight : 0.0f);
      }
    }
  }

  __device__ void write(float* out, int added, int tokens) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float all = kOf == MassOf::largest ? Tile::largest_column(mass[i]) : Tile::sum_columns(mass[i]);
      const int token = Tile::token(i);
      if (i == Tile::c && token < tokens) {
        out[token] = token < added ? join(kOf, out[token], all) : all;
      }
    }
  }
};

// Grid (blocks of tokens, KV heads).
template <int kHeadDim, MassOf kOf>
__global__ void __launch_bounds__(kThreads) attention_mass_kernel(MassArgs args) {
  __shared__ Column columns[kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int group = args.heads / args.shape.kv_heads;
  Tokens<kHeadDim, kOf> tokens;
  tokens.place(static_cast<int>(blockIdx.x) * kBlockTokens + thread / 32 * kTileTokens, thread % 32);
  const bool any = tokens.first < args.tokens;
  if (any) {
    tokens.load(args.kv, kv_head);
  }
  for (int first = 0; first < args.rows * group; first += kColumns) {
    __syncthreads();
    for (int i = thread; i < kColumns; i += kThreads) {
      columns[i] = find_column(args, kv_head, group, first + i);
    }
    __syncthreads();
    const int count = min(kColumns, args.rows * group - first);
    for (int tile = 0; any && tile < count; tile += 8) {
      // Positions rise: what the last column does not see, none does.
      if (columns[min(tile + 8, count) - 1].position >= tokens.first) {
        tokens.meet(columns + tile, args.queries.q, args.scale * kLog2E);
      }
    }
  }
  if (any) {
    tokens.write(args.mass + static_cast<size_t>(kv_head) * args.stride, args.added, args.tokens);
  }
}

template <int kHeadDim>
void launch(const MassArgs& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((args.tokens + kBlockTokens - 1) / kBlockTokens),
                    static_cast<unsigned>(args.shape.kv_heads));
  if (args.of == MassOf::largest) {
    attention_mass_kernel<kHeadDim, MassOf::largest><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    attention_mass_kernel<kHeadDim, MassOf::sum><<<blocks, kThreads, 0, stream>>>(args);
  }
  check_cuda(cudaGetLastError(), "attention_mass");
}

}  // namespace

void attention_mass(const MassArgs& args, cudaStream_t stream) {
  check(args.rows <= args.queries.capacity && args.position >= args.queries.origin,
        "the queries that vote stand in their ring");
  check(args.tokens <= args.stride && args.added <= args.tokens, "the mass of a head has room");
  check(args.kv.past.format.exact() && args.kv.tail.format.exact(), "mass is that of the full KV");
  if (args.tokens == 0) {
    return;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) { launch<decltype(dim)::kValue>(args, stream); });
}

}  // namespace vericache::cuda
