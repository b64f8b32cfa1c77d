// What keys alone tell of their tokens: how short they are, or how far they point from the mean direction.
// One thread a token; directions are summed piece by piece (kKeyPieceTokens), a block each, and every block of the
// second kernel adds the pieces up in their order.
#include <cuda_runtime.h>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/key_tile.cuh"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kThreads = 256;

// One over the length of a vector; a vector without length has no direction.
__device__ inline float inverse_length(float square) {
  return square > 0 ? 1 / sqrtf(square) : 0;
}

// Calls body(dim, a pair of keys' values at dim and dim + 1) for every pair of a token.
template <int kHeadDim, typename Body>
__device__ inline void each_pair(const std::byte* page, int token, const Body& body) {
#pragma unroll
  for (int dim = 0; dim < kHeadDim; dim += 8) {
    const uint4 part = *reinterpret_cast<const uint4*>(page + key_index(token, dim) * 2);
    body(dim, part.x);
    body(dim + 2, part.y);
    body(dim + 4, part.z);
    body(dim + 6, part.w);
  }
}

template <int kHeadDim>
__device__ inline float square_of(const std::byte* page, int token) {
  float square = 0;
  each_pair<kHeadDim>(page, token, [&](int, uint32_t pair) {
    const float first = first_of_pair(pair);
    const float second = second_of_pair(pair);
    square += first * first + second * second;
  });
  return square;
}

// Grid (pieces, KV heads). sums (kv_heads, pieces, head_dim).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) sum_directions_kernel(KeyScoreArgs args) {
  constexpr int kPairs = kHeadDim / 2;
  constexpr int kLanes = kThreads / kPairs;  // tokens at a time; threads beyond have no pair
  __shared__ float factors[kKeyPieceTokens];
  __shared__ float2 parts[kLanes][kPairs];
  const int thread = static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(blockIdx.x) * kKeyPieceTokens;
  const int count = min(kKeyPieceTokens, args.tokens - first);
  for (int i = thread; i < count; i += kThreads) {
    const std::byte* page = full_head_page(args.kv, kv_head, (first + i) / kPageTokens);
    factors[i] = inverse_length(square_of<kHeadDim>(page, i % kPageTokens));
  }
  __syncthreads();
  const int pair = thread % kPairs;
  const int lane = thread / kPairs;
  if (lane < kLanes) {
    float2 sum = make_float2(0, 0);
    for (int i = lane; i < count; i += kLanes) {
      const std::byte* page = full_head_page(args.kv, kv_head, (first + i) / kPageTokens);
      const uint32_t values = *reinterpret_cast<const uint32_t*>(page + key_index(i % kPageTokens, 2 * pair) * 2);
      sum.x += first_of_pair(values) * factors[i];
      sum.y += second_of_pair(values) * factors[i];
    }
    parts[lane][pair] = sum;
  }
  __syncthreads();
  if (lane == 0) {
    float2 sum = parts[0][pair];
    for (int i = 1; i < kLanes; ++i) {
      sum.x += parts[i][pair].x;
      sum.y += parts[i][pair].y;
    }
    float* out = args.scratch + (static_cast<size_t>(kv_head) * gridDim.x + blockIdx.x) * kHeadDim;
    out[2 * pair] = sum.x;
    out[2 * pair + 1] = sum.y;
  }
}

// Grid (blocks of tokens, KV heads).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) key_scores_kernel(KeyScoreArgs args, int pieces) {
  __shared__ float mean[kHeadDim];
  const int thread = static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  const bool beside_mean = args.measure == KeyMeasure::difference;
  if (beside_mean) {
    if (thread < kHeadDim) {
      float sum = 0;
      for (int piece = 0; piece < pieces; ++piece) {
        sum += args.scratch[(static_cast<size_t>(kv_head) * static_cast<size_t>(pieces) + static_cast<size_t>(piece)) *
                                kHeadDim +
                            static_cast<size_t>(thread)];
      }
      mean[thread] = sum;
    }
    __syncthreads();
  }
  const int token = static_cast<int>(blockIdx.x) * kThreads + thread;
  if (token >= args.tokens) {
    return;
  }
  const std::byte* page = full_head_page(args.kv, kv_head, token / kPageTokens);
  float score;
  if (beside_mean) {
    float square = 0;
    float product = 0;
    float mean_square = 0;
    each_pair<kHeadDim>(page, token % kPageTokens, [&](int dim, uint32_t pair) {
      const float first = first_of_pair(pair);
      const float second = second_of_pair(pair);
      square += first * first + second * second;
      product += first * mean[dim] + second * mean[dim + 1];
      mean_square += mean[dim] * mean[dim] + mean[dim + 1] * mean[dim + 1];
    });
    score = -product * inverse_length(square) * inverse_length(mean_square);
  } else {
    score = -sqrtf(square_of<kHeadDim>(page, token % kPageTokens));
  }
  args.scores[static_cast<size_t>(kv_head) * static_cast<size_t>(args.tokens) + static_cast<size_t>(token)] = score;
}

template <int kHeadDim>
void launch(const KeyScoreArgs& args, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(args.shape.kv_heads);
  const int pieces = (args.tokens + kKeyPieceTokens - 1) / kKeyPieceTokens;
  if (args.measure == KeyMeasure::difference) {
    sum_directions_kernel<kHeadDim><<<dim3(static_cast<unsigned>(pieces), heads), kThreads, 0, stream>>>(args);
    check_cuda(cudaGetLastError(), "summing the directions of keys");
  }
  const auto blocks = static_cast<unsigned>((args.tokens + kThreads - 1) / kThreads);
  key_scores_kernel<kHeadDim><<<dim3(blocks, heads), kThreads, 0, stream>>>(args, pieces);
  check_cuda(cudaGetLastError(), "key_scores");
}

}  // namespace

void key_scores(const KeyScoreArgs& args, cudaStream_t stream) {
  check(args.kv.past.format.exact() && args.kv.tail.format.exact(), "keys are those of the full KV");
  if (args.tokens == 0) {
    return;
  }
  for_head_dim(args.shape.head_dim, [&](auto dim) { launch<decltype(dim)::kValue>(args, stream); });
}

}  // namespace vericache::cuda
