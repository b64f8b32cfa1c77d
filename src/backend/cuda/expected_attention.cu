// Attention that queries to come will pay, from the mean and the spread of the last ones: kernels.h has the formula.
// One query head of each KV head after the other: its queries are turned to the positions to come and centred, a warp
// meets 32 tokens with eight of them at a time, a block finds the softmax's maximum and sum, a thread a token adds up.
#include <cuda_runtime.h>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/key_tile.cuh"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kTurnLanes = 8;  // rows, or positions, at a time
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockTokens = kWarps * kTileTokens;
constexpr int kSoftmaxThreads = 1024;

struct Scratch {
  bf16* queries;     // (kv_heads, expected_rows, head_dim)
  float* exponents;  // (kv_heads, tokens)
  float* softmax;    // (kv_heads, 2): maximum, sum
};

// The sum over the block's lanes of one pair, in the order of the lanes. part (kTurnLanes, pairs).
__device__ inline float2 sum_lanes(float2 own, float2* part, int pairs, int pair, int lane) {
  __syncthreads();
  part[lane * pairs + pair] = own;
  __syncthreads();
  float2 sum = make_float2(0, 0);
  for (int i = 0; i < kTurnLanes; ++i) {
    sum.x += part[i * pairs + pair].x;
    sum.y += part[i * pairs + pair].y;
  }
  return sum;
}

// Grid (KV heads), block (pairs * kTurnLanes).
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim / 2 * kTurnLanes)
    turn_queries_kernel(ExpectedArgs args, int member, int out_rows, bf16* queries) {
  constexpr int kPairs = kHeadDim / 2;
  __shared__ float2 part[kTurnLanes * kPairs];
  const int pair = static_cast<int>(threadIdx.x) % kPairs;
  const int lane = static_cast<int>(threadIdx.x) / kPairs;
  const int kv_head = static_cast<int>(blockIdx.x);
  const int head = kv_head * (args.heads / args.shape.kv_heads) + member;

  const int first = min(args.from, args.rope.positions - 1);
  const int last = max(first + 1, min(args.from + args.future, args.rope.positions));
  float2 future = make_float2(0, 0);
  for (int position = first + lane; position < last; position += kTurnLanes) {
    future.x += args.rope.cos[static_cast<size_t>(position) * kPairs + static_cast<size_t>(pair)];
    future.y += args.rope.sin[static_cast<size_t>(position) * kPairs + static_cast<size_t>(pair)];
  }
  future = sum_lanes(future, part, kPairs, pair, lane);
  const float share = 1.0f / static_cast<float>(last - first);
  future.x *= share;
  future.y *= share;

  const auto turned = [&](int row) {
    const int position = args.position + row;
    const int slot = (position - args.queries.origin) % args.queries.capacity;
    const bf16* q =
        args.queries.q +
        (static_cast<size_t>(slot) * static_cast<size_t>(args.heads) + static_cast<size_t>(head)) * kHeadDim;
    const float cos = args.rope.cos[static_cast<size_t>(position) * kPairs + static_cast<size_t>(pair)];
    const float sin = args.rope.sin[static_cast<size_t>(position) * kPairs + static_cast<size_t>(pair)];
    const float inverse = 1 / (cos * cos + sin * sin);  // of Yarn's temperature, else 1
    const float a = first_of_pair(q[pair].bits);
    const float b = first_of_pair(q[pair + kPairs].bits);
    const float x = (a * cos + b * sin) * inverse;
    const float y = (b * cos - a * sin) * inverse;
    return make_float2(x * future.x - y * future.y, y * future.x + x * future.y);
  };
  float2 mean = make_float2(0, 0);
  for (int row = lane; row < args.rows; row += kTurnLanes) {
    const float2 one = turned(row);
    mean.x += one.x;
    mean.y += one.y;
  }
  mean = sum_lanes(mean, part, kPairs, pair, lane);
  mean.x /= static_cast<float>(args.rows);
  mean.y /= static_cast<float>(args.rows);

  bf16* out = queries + static_cast<size_t>(kv_head) * static_cast<size_t>(out_rows) * kHeadDim;
  for (int row = lane; row < out_rows; row += kTurnLanes) {
    float2 value = mean;
    if (row > args.rows) {
      value = make_float2(0, 0);
    } else if (row > 0) {
      const float2 one = turned(row - 1);
      value = make_float2(one.x - mean.x, one.y - mean.y);
    }
    out[static_cast<size_t>(row) * kHeadDim + static_cast<size_t>(pair)] = {
        static_cast<uint16_t>(pack_pair(value.x, 0))};
    out[static_cast<size_t>(row) * kHeadDim + static_cast<size_t>(pair + kPairs)] = {
        static_cast<uint16_t>(pack_pair(value.y, 0))};
  }
}

// Grid (blocks of tokens, KV heads).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) exponents_kernel(ExpectedArgs args, int query_rows, Scratch scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  KeyTile<kHeadDim> tile;
  tile.place(static_cast<int>(blockIdx.x) * kBlockTokens + thread / 32 * kTileTokens, thread % 32);
  if (tile.first >= args.tokens) {
    return;
  }
  tile.load(args.kv, kv_head);
  const bf16* queries = scratch.queries + static_cast<size_t>(kv_head) * static_cast<size_t>(query_rows) * kHeadDim;
  float linear[4] = {};
  float squares[4] = {};
  for (int row = 0; row < query_rows; row += 8) {
    float scores[2][4] = {};
    tile.products(queries + static_cast<size_t>(row + tile.g) * kHeadDim, scores);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const bool is_mean = row + 2 * tile.c + n == 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = scores[i / 2][i % 2 * 2 + n] * args.scale;
        linear[i] += is_mean ? x : 0.0f;
        squares[i] += is_mean ? 0.0f : x * x;
      }
    }
  }
  float* out = scratch.exponents + static_cast<size_t>(kv_head) * static_cast<size_t>(args.tokens);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float exponent =
        tile.sum_columns(linear[i]) + tile.sum_columns(squares[i]) / static_cast<float>(2 * args.rows);
    if (i == tile.c && tile.token(i) < args.tokens) {
      out[tile.token(i)] = exponent;
    }
  }
}

template <typename Fold>
__device__ inline float fold_block(float own, float (&warps)[kSoftmaxThreads / 32], const Fold& fold) {
  for (int step = 16; step > 0; step /= 2) {
    own = fold(own, __shfl_xor_sync(kAllLanes, own, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = own;
  }
  __syncthreads();
  float all = warps[0];
  for (int i = 1; i < kSoftmaxThreads / 32; ++i) {
    all = fold(all, warps[i]);
  }
  return all;
}

// Grid (KV heads).
__global__ void __launch_bounds__(kSoftmaxThreads) softmax_kernel(int sinks, int tokens, Scratch scratch) {
  __shared__ float warps[kSoftmaxThreads / 32];
  const float* exponents = scratch.exponents + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(tokens);
  float top = -kInfinity;
  for (int i = sinks + static_cast<int>(threadIdx.x); i < tokens; i += kSoftmaxThreads) {
    top = fmaxf(top, exponents[i]);
  }
  top = fold_block(top, warps, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int i = sinks + static_cast<int>(threadIdx.x); i < tokens; i += kSoftmaxThreads) {
    sum += expf(exponents[i] - top);
  }
  sum = fold_block(sum, warps, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) {
    scratch.softmax[2 * blockIdx.x] = top;
    scratch.softmax[2 * blockIdx.x + 1] = sum;
  }
}

template <int kHeadDim>
__device__ inline float value_length(const ExpectedArgs& args, int kv_head, int token) {
  const auto* values =
      reinterpret_cast<const bf16*>(full_head_page(args.kv, kv_head, token / kPageTokens)) + kPageTokens * kHeadDim;
  float square = 0;
#pragma unroll 8
  for (int dim = 0; dim < kHeadDim; ++dim) {
    const float x = first_of_pair(values[value_index(token % kPageTokens, dim, kHeadDim)].bits);
    square += x * x;
  }
  return sqrtf(square);
}

// Grid (blocks of tokens, KV heads).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) add_shares_kernel(ExpectedArgs args, int member, Scratch scratch) {
  const int token = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  if (token >= args.tokens) {
    return;
  }
  const int group = args.heads / args.shape.kv_heads;
  const size_t at = static_cast<size_t>(kv_head) * static_cast<size_t>(args.tokens) + static_cast<size_t>(token);
  if (token < args.sinks) {
    args.scores[at] = kInfinity;
    return;
  }
  const float top = scratch.softmax[2 * kv_head];
  const float sum = scratch.softmax[2 * kv_head + 1];
  float score = expf(scratch.exponents[at] - top) / (sum * static_cast<float>(group));
  if (member > 0) {
    score += args.scores[at];
  }
  args.scores[at] = member + 1 < group ? score : score * value_length<kHeadDim>(args, kv_head, token);
}

template <int kHeadDim>
void launch(const ExpectedArgs& args, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(args.shape.kv_heads);
  const int query_rows = expected_rows(args.rows);
  Scratch scratch{};
  scratch.queries = reinterpret_cast<bf16*>(args.scratch);
  scratch.exponents = reinterpret_cast<float*>(args.scratch + expected_query_bytes(args.rows, args.shape));
  scratch.softmax = scratch.exponents + static_cast<size_t>(args.shape.kv_heads) * static_cast<size_t>(args.tokens);
  const auto blocks_of = [](int tokens, int per_block) {
    return static_cast<unsigned>((tokens + per_block - 1) / per_block);
  };
  for (int member = 0; member < args.heads / args.shape.kv_heads; ++member) {
    turn_queries_kernel<kHeadDim>
        <<<heads, kHeadDim / 2 * kTurnLanes, 0, stream>>>(args, member, query_rows, scratch.queries);
    check_cuda(cudaGetLastError(), "turning queries to come");
    exponents_kernel<kHeadDim>
        <<<dim3(blocks_of(args.tokens, kBlockTokens), heads), kThreads, 0, stream>>>(args, query_rows, scratch);
    check_cuda(cudaGetLastError(), "exponents of expected attention");
    softmax_kernel<<<heads, kSoftmaxThreads, 0, stream>>>(args.sinks, args.tokens, scratch);
    check_cuda(cudaGetLastError(), "the softmax of expected attention");
    add_shares_kernel<kHeadDim>
        <<<dim3(blocks_of(args.tokens, kThreads), heads), kThreads, 0, stream>>>(args, member, scratch);
    check_cuda(cudaGetLastError(), "expected_attention");
  }
}

}  // namespace

void expected_attention(const ExpectedArgs& args, cudaStream_t stream) {
  check(args.rows > 0 && args.rows <= args.queries.capacity && args.position >= args.queries.origin,
        "the queries that speak for those to come stand in their ring");
  check(args.position + args.rows <= args.rope.positions, "RoPE knows the positions of the queries");
  check(args.kv.past.format.exact() && args.kv.tail.format.exact(), "keys and values are those of the full KV");
  if (args.tokens == 0) {
    return;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) { launch<decltype(dim)::kValue>(args, stream); });
}

}  // namespace vericache::cuda
