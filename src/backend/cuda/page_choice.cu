// Which pages draft attention reads (Quest, Tang et al. 2024, section 3.2): one kernel bounds the scores of every page
// from the bounds of its keys, one finds the best of a KV head and lists where they lie.
#include <cuda_runtime.h>

#include "backend/cuda/best_of_row.cuh"
#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/packed_math.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kBoundWarps = 4;
constexpr int kBoundThreads = kBoundWarps * 32;
constexpr int kWarpPages = 8;  // rows g and g + 8 of a tensor-core step are the two runs of a page
static_assert(kBoundRuns == 2);
constexpr int kTileHeads = 8;  // its columns
constexpr int kChooseThreads = 256;

__device__ inline int pages_of(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}
__device__ inline int past_tokens(const SequenceRows& sequence, int head) {
  return sequence.kv.past.tokens == nullptr ? 0 : sequence.kv.past.tokens[head];
}

// The negative ones of a pair of bf16, zero for the other.
__device__ inline uint32_t negatives(uint32_t pair) {
  return pair & (pair >> 15 & 0x00010001u) * 0xffffu;
}

// The most that the queries of up to 8 heads can score with a key of one of a page's runs: negative channels of q meet
// the smallest of k, the others the largest. bounds: those of the page of row g, from the dims 8 c on. In scores row g
// is the first run, row g + 8 the second, a column a head.
template <int kHeadDim>
__device__ void bound_scores(const std::byte* bounds, const bf16* q, int heads, float (&scores)[4]) {
  constexpr int kBoundBytes = kHeadDim * 2;  // smallest of the first run, largest, then those of the second
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int group = 0; group < kHeadDim / 32; ++group) {
    uint32_t pairs[4] = {};
    if (lane / 4 < heads) {
      read16(reinterpret_cast<const std::byte*>(q + lane / 4 * kHeadDim + 32 * group + lane % 4 * 8), pairs);
    }
    const uint32_t low[4] = {negatives(pairs[0]), negatives(pairs[1]), negatives(pairs[2]), negatives(pairs[3])};
    const std::byte* of_group = bounds + group * 64;
    uint4 first = read16(of_group);
    uint4 second = read16(of_group + 2 * kBoundBytes);
    tensor_step(scores, first.x, second.x, first.y, second.y, low[0], low[1]);
    tensor_step(scores, first.z, second.z, first.w, second.w, low[2], low[3]);
    first = read16(of_group + kBoundBytes);
    second = read16(of_group + 3 * kBoundBytes);
    tensor_step(scores, first.x, second.x, first.y, second.y, pairs[0] ^ low[0], pairs[1] ^ low[1]);
    tensor_step(scores, first.z, second.z, first.w, second.w, pairs[2] ^ low[2], pairs[3] ^ low[3]);
  }
}

// Grid (pages, KV heads, sequences): a warp bounds 8 pages.
template <int kHeadDim>
__global__ void __launch_bounds__(kBoundThreads) bound_pages_kernel(PageChoiceArgs args, size_t bounds_offset) {
  const SequenceRows& sequence = args.sequences[blockIdx.z];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int held = pages_of(past_tokens(sequence, kv_head));
  const int first = (static_cast<int>(blockIdx.x) * kBoundWarps + static_cast<int>(threadIdx.x) / 32) * kWarpPages;
  if (first >= held) {
    return;  // the warp
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int page = first + lane / 4;
  const KvView& past = sequence.kv.past;
  const std::byte* bounds = past.head_pages[static_cast<ptrdiff_t>(kv_head) * past.page_stride + min(page, held - 1)] +
                            bounds_offset + lane % 4 * 16;
  const int group = args.heads / args.shape.kv_heads;
  const bf16* q = args.q + (static_cast<size_t>(sequence.first_row) * args.heads + kv_head * group) * kHeadDim;
  float sum = 0;  // over the heads 2 c and 2 c + 1 of every tile; a head that is not there has scored 0
#pragma unroll 1
  for (int head = 0; head < group; head += kTileHeads) {
    float scores[4] = {};
    bound_scores<kHeadDim>(bounds, q + head * kHeadDim, min(kTileHeads, group - head), scores);
    sum += fmaxf(scores[0], scores[2]) + fmaxf(scores[1], scores[3]);
  }
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  if (lane % 4 == 0 && page < held) {
    args.scores[(static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y) * static_cast<size_t>(args.stride) +
                static_cast<size_t>(page)] = sum;
  }
}

// A block a (sequence, KV head).
__global__ void __launch_bounds__(kChooseThreads) choose_pages_kernel(PageChoiceArgs args) {
  __shared__ BestShared<kChooseThreads> shared;
  const Cluster cluster;  // of one block
  const auto pair = static_cast<size_t>(blockIdx.x);
  const int kv_head = static_cast<int>(blockIdx.x) % args.shape.kv_heads;
  const SequenceRows& sequence = args.sequences[blockIdx.x / static_cast<unsigned>(args.shape.kv_heads)];
  const KvView& past = sequence.kv.past;
  const int tokens = past_tokens(sequence, kv_head);
  const int held = pages_of(tokens);
  const int count = args.format.choice.pages_of(held);
  if (held > args.stride) {
    __trap();  // a sequence longer than the caller said
  }
  if (count == 0) {
    if (threadIdx.x == 0) {
      args.tokens[pair] = 0;
    }
    return;  // the block
  }
  const RowSlice slice(cluster, args.scores + pair * static_cast<size_t>(args.stride), held);
  Threshold threshold;  // no score has the highest key: all are better
  if (count < held) {
    threshold = find_threshold(cluster, slice, count, shared.walk);
  }
  std::byte* const* table = past.head_pages + static_cast<ptrdiff_t>(kv_head) * past.page_stride;
  std::byte** pages = args.pages + pair * static_cast<size_t>(args.stride);
  write_chosen(slice, threshold, 0, 0, shared, [&](uint32_t place, int page) {
    pages[place] = table[page];
    if (place + 1 == static_cast<uint32_t>(count)) {  // the head's last page may not be full
      args.tokens[pair] = (count - 1) * kPageTokens + min(kPageTokens, tokens - page * kPageTokens);
    }
  });
}

}  // namespace

void choose_pages(const PageChoiceArgs& args, cudaStream_t stream) {
  check(args.format.choice.bounded && args.stride % 4 == 0, "pages are chosen by bounds, from rows of quads");
  if (args.count == 0) {
    return;
  }
  constexpr int kBlockPages = kBoundWarps * kWarpPages;
  const int kv_heads = args.shape.kv_heads;
  const dim3 blocks(static_cast<unsigned>((args.stride + kBlockPages - 1) / kBlockPages),
                    static_cast<unsigned>(kv_heads), static_cast<unsigned>(args.count));
  const size_t offset = key_bounds_offset(args.format, args.shape);
  for_head_dim(args.shape.head_dim, [&](auto dim) {
    bound_pages_kernel<decltype(dim)::kValue><<<blocks, kBoundThreads, 0, stream>>>(args, offset);
  });
  check_cuda(cudaGetLastError(), "bounds of pages");
  choose_pages_kernel<<<static_cast<unsigned>(args.count * kv_heads), kChooseThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "choice of pages");
}

}  // namespace vericache::cuda
