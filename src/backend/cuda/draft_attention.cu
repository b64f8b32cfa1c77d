// Attention of draft rows, one a sequence, over resident KV as it is stored, then the bf16 tail.
// A block takes one split of one KV head's pages and up to 8 of the query heads that share them; its warps take pages
// in turn and join their sums. A second kernel folds the splits.
#include <cuda_runtime.h>

#include <algorithm>

#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/draft_warp.cuh"
#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kBlocksPerMultiprocessor = 3;  // 3 x 74 KB of shared memory, 12 warps of up to 168 registers
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// The blocks that an H200 runs at once. Another count only changes how evenly the work falls.
constexpr int kSlots = 132 * kBlocksPerMultiprocessor;
constexpr int kWaves = 4;          // of blocks, when there is much to do: long and short sequences even out
constexpr int kOneWavePages = 64;  // of a slot; less is done in one wave, so that no second one waits for memory
constexpr int kMaxSplits = kWaves * kSlots + 2;

__host__ __device__ constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// How the pages of past and those of the tail are cut: each into splits of `pages`, `count` of them at most together.
struct Cut {
  int pages = 0;
  int count = 0;
};
Cut cut_pages(int pairs, int longest_tokens) {
  const int pages = ceil_div(longest_tokens, kPageTokens) + 1;  // past and tail may both end within a page
  const int per_slot = ceil_div(pages * pairs, kSlots);
  const int wanted = per_slot <= kOneWavePages ? per_slot : ceil_div(pages * pairs, kWaves * kSlots);
  const int split = ceil_div(wanted, kWarps) * kWarps;
  return {split, (pages + 2 * (split - 1)) / split};
}

int head_tiles(int group) {
  return ceil_div(group, kTileHeads);
}

struct DraftArgs {
  const bf16* q = nullptr;  // (rows, heads, head_dim)
  const SequenceRows* sequences = nullptr;
  int heads = 0;
  int group = 0;  // query heads of a KV head
  int head_tiles = 0;
  float scale_log2 = 0;
  KvFormat format{};
  Pieces keys{};  // of past
  Pieces values{};
  Cut cut{};
  std::byte* const* chosen =
      nullptr;  // (sequences, KV heads, chosen_stride): the pages of past that are read; null: all
  const int* chosen_tokens = nullptr;  // (sequences, KV heads): that they hold
  int chosen_stride = 0;
  int kv_heads = 0;
  float* partials = nullptr;  // (sequences, heads, splits, head_dim)
  float2* tops = nullptr;     // (sequences, heads, splits): maximum of the scores in powers of two, sum of weights
  bf16* out = nullptr;
  float* log_sum_exp = nullptr;
};

// The pages of a split.
struct Run {
  std::byte* const* pages = nullptr;
  int first = 0;
  int last = 0;
  int tokens = 0;  // held from page 0 on
  bool tail = false;
};

__device__ inline int pages_of(int tokens) {
  return ceil_div(tokens, kPageTokens);
}
// What is read of past.
__device__ inline int past_tokens(const DraftArgs& args, int sequence, int head) {
  if (args.chosen != nullptr) {
    return args.chosen_tokens[sequence * args.kv_heads + head];
  }
  const KvView& past = args.sequences[sequence].kv.past;
  return past.tokens == nullptr ? 0 : past.tokens[head];
}
__device__ inline std::byte* const* past_pages(const DraftArgs& args, int sequence, int head) {
  if (args.chosen != nullptr) {
    return args.chosen + static_cast<ptrdiff_t>(sequence * args.kv_heads + head) * args.chosen_stride;
  }
  const KvView& past = args.sequences[sequence].kv.past;
  return past.head_pages + static_cast<ptrdiff_t>(head) * past.page_stride;
}
__device__ inline int tail_tokens(const SequenceRows& sequence) {
  return sequence.position + 1 - sequence.kv.tail_position;
}

// The splits of past come first, then those of the tail; a run behind them is empty.
__device__ inline Run find_run(const DraftArgs& args, int index, int head, int split) {
  const SequenceRows& sequence = args.sequences[index];
  const int split_pages = args.cut.pages;
  const int past = past_tokens(args, index, head);
  const int past_splits = ceil_div(pages_of(past), split_pages);
  const bool tail = split >= past_splits;
  const int tokens = tail ? tail_tokens(sequence) : past;
  const int first = (tail ? split - past_splits : split) * split_pages;
  const KvView& tail_view = sequence.kv.tail;
  return {tail ? tail_view.head_pages + static_cast<ptrdiff_t>(head) * tail_view.page_stride
               : past_pages(args, index, head),
          first, min(pages_of(tokens), first + split_pages), tokens, tail};
}

template <int kHeadDim, bool kChunked>
constexpr size_t shared_bytes() {
  using Ring = typename DraftWarp<kHeadDim, kChunked>::Ring;
  static_assert(DraftWarp<kHeadDim, kChunked>::kStoredFloats * sizeof(float) <= Ring::kBytes);
  return kWarps * (Ring::kBytes + Ring::kBarrierBytes);
}

// The warps' sums become one, in the order of the warps.
template <int kHeadDim, bool kChunked>
__device__ void join_warps(const DraftArgs& args, const std::byte* shared, int first_head, int heads) {
  using Warp = DraftWarp<kHeadDim, kChunked>;
  const auto stored = [&](int warp) { return reinterpret_cast<const float*>(shared + warp * Warp::Ring::kBytes); };
  for (int i = static_cast<int>(threadIdx.x); i < heads * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim;
    const int dim = i % kHeadDim;
    float top = -kInfinity;
    for (int warp = 0; warp < kWarps; ++warp) {
      top = fmaxf(top, stored(warp)[kTileHeads * Warp::kRowFloats + head]);
    }
    float out = 0;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* of_warp = stored(warp);
      const float weight = exp2_approx(of_warp[kTileHeads * Warp::kRowFloats + head] - top);
      out = fmaf(of_warp[head * Warp::kRowFloats + dim], weight, out);
      sum = fmaf(of_warp[kTileHeads * (Warp::kRowFloats + 1) + head], weight, sum);
    }
    const size_t partial =
        (static_cast<size_t>(blockIdx.y) * args.heads + first_head + head) * args.cut.count + blockIdx.z;
    args.partials[partial * kHeadDim + dim] = out;
    if (dim == 0) {
      args.tops[partial] = make_float2(top, sum);
    }
  }
}

// Grid (head tiles, sequences, splits): a sequence's last splits, which are short, are begun last, and fill up.
template <int kHeadDim, bool kChunked>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) draft_attention_kernel(DraftArgs args) {
  using Ring = typename DraftWarp<kHeadDim, kChunked>::Ring;
  extern __shared__ __align__(128) std::byte shared[];
  const SequenceRows& sequence = args.sequences[blockIdx.y];
  const int kv_head = static_cast<int>(blockIdx.x) / args.head_tiles;
  const int first_of_group = static_cast<int>(blockIdx.x) % args.head_tiles * kTileHeads;
  const int first_head = kv_head * args.group + first_of_group;
  const int heads = min(kTileHeads, args.group - first_of_group);
  allow_kernel_behind();
  // The kernel before this one writes the queries and the tail's last row, or chooses pages. What is read of past was
  // there before.
  if (args.chosen != nullptr) {
    await_kernels_before();
  }
  const Run run = find_run(args, static_cast<int>(blockIdx.y), kv_head, static_cast<int>(blockIdx.z));
  if (run.first >= run.last) {
    return;
  }
  if (run.tail) {
    await_kernels_before();
  }
  const int warp_index = uniform(static_cast<int>(threadIdx.x) / 32);
  std::byte* memory = shared + warp_index * Ring::kBytes;
  std::byte* barriers = shared + kWarps * Ring::kBytes + warp_index * Ring::kBarrierBytes;
  const KvFormat format = run.tail ? KvFormat{} : args.format;
  Ring ring(memory, barriers,
            {run.pages, run.first + warp_index, run.last, kWarps, run.tail ? key_pieces(KvPart{}, kHeadDim) : args.keys,
             run.tail ? value_pieces(KvPart{}, kHeadDim) : args.values});
  await_kernels_before();
  DraftWarp<kHeadDim, kChunked> warp;
  warp.load_queries(args.q + (static_cast<size_t>(sequence.first_row) * args.heads + first_head) * kHeadDim, heads,
                    format.rotated);
#pragma unroll 1
  for (int page = run.first + warp_index; page < run.last; page += kWarps) {
    warp.add_page(ring, format.key(), format.value(), min(kPageTokens, run.tokens - page * kPageTokens),
                  args.scale_log2);
  }
  warp.store(reinterpret_cast<float*>(memory));
  __syncthreads();
  join_warps<kHeadDim, kChunked>(args, shared, first_head, heads);
}

constexpr int kFoldThreads = 256;

// Over the block, in a fixed order; the result in every thread.
template <typename Join>
__device__ float reduce_block(float value, float* of_warps, const Join& join) {
  for (int reach = 16; reach > 0; reach /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, reach));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    of_warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < kFoldThreads / 32; ++warp) {
    value = join(value, of_warps[warp]);
  }
  return value;
}

__device__ inline float4 add(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// One block a query head of a sequence: the splits that had work become one row of the output.
template <int kHeadDim>
__global__ void __launch_bounds__(kFoldThreads) fold_splits_kernel(DraftArgs args) {
  constexpr int kLanes = kHeadDim / 4;  // that share a split, four dims each
  constexpr int kAbreast = kFoldThreads / kLanes;
  __shared__ float weights[kMaxSplits];
  __shared__ float of_warps[kFoldThreads / 32];
  __shared__ float4 sums[kAbreast][kLanes];
  await_kernels_before();
  const SequenceRows& sequence = args.sequences[blockIdx.y];
  const int head = static_cast<int>(blockIdx.x);
  const int kv_head = head / args.group;
  const int past_splits = ceil_div(pages_of(past_tokens(args, static_cast<int>(blockIdx.y), kv_head)), args.cut.pages);
  const int splits = past_splits + ceil_div(pages_of(tail_tokens(sequence)), args.cut.pages);
  if (splits > args.cut.count) {
    __trap();  // a sequence longer than the caller said
  }
  const size_t first = (static_cast<size_t>(blockIdx.y) * args.heads + head) * args.cut.count;
  const int thread = static_cast<int>(threadIdx.x);

  float top = -kInfinity;
  for (int i = thread; i < splits; i += kFoldThreads) {
    top = fmaxf(top, args.tops[first + i].x);
  }
  top = reduce_block(top, of_warps, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int i = thread; i < splits; i += kFoldThreads) {
    const float2 split = args.tops[first + i];
    weights[i] = exp2_approx(split.x - top);
    sum = fmaf(split.y, weights[i], sum);
  }
  sum = reduce_block(sum, of_warps, [](float a, float b) { return a + b; });

  // Of the splits [begin, end), in the first kLanes threads.
  const int lane = thread % kLanes;
  const auto sum_of = [&](int begin, int end) {
    if (thread < kAbreast * kLanes) {
      const auto* partials = reinterpret_cast<const float4*>(args.partials) + first * kLanes + lane;
      float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int i = begin + thread / kLanes; i < end; i += kAbreast) {
        const float4 split = partials[static_cast<size_t>(i) * kLanes];
        const float weight = weights[i];
        out = make_float4(fmaf(split.x, weight, out.x), fmaf(split.y, weight, out.y), fmaf(split.z, weight, out.z),
                          fmaf(split.w, weight, out.w));
      }
      sums[thread / kLanes][lane] = out;
    }
    __syncthreads();
    float4 out = sums[0][lane];
    for (int i = 1; thread < kLanes && i < kAbreast; ++i) {
      out = add(out, sums[i][lane]);
    }
    __syncthreads();
    return out;
  };
  float4 turned = make_float4(0, 0, 0, 0);  // what rotated pages gave
  if (args.format.rotated) {
    turned = sum_of(0, past_splits);
    if (thread < kLanes) {
      turned = rotate_sums<kHeadDim>(turned);
    }
  }
  const float4 out = add(sum_of(args.format.rotated ? past_splits : 0, splits), turned);
  const size_t row = static_cast<size_t>(sequence.first_row);
  if (thread < kLanes) {
    const float inverse = 1.0f / sum;
    const uint2 pairs = {pack_pair(out.x * inverse, out.y * inverse), pack_pair(out.z * inverse, out.w * inverse)};
    reinterpret_cast<uint2*>(args.out + (row * args.heads + head) * kHeadDim)[lane] = pairs;
  }
  if (thread == 0 && args.log_sum_exp != nullptr) {
    args.log_sum_exp[row * args.heads + head] = (top + log2f(sum)) * kLn2;
  }
}

template <int kHeadDim, bool kChunked>
void launch_splits(const DraftArgs& args, dim3 blocks, cudaStream_t stream) {
  const size_t bytes = shared_bytes<kHeadDim, kChunked>();
  const auto kernel = draft_attention_kernel<kHeadDim, kChunked>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "shared memory of draft attention");
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "shared memory of draft attention");
  launch_behind(kernel, "draft attention", blocks, kThreads, bytes, stream, args);
}

template <int kHeadDim>
void launch(const DraftArgs& args, int kv_heads, int sequences, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(kv_heads * args.head_tiles), static_cast<unsigned>(sequences),
                    static_cast<unsigned>(args.cut.count));
  if (chunked(args.format.key()) || chunked(args.format.value())) {
    launch_splits<kHeadDim, true>(args, blocks, stream);
  } else {
    launch_splits<kHeadDim, false>(args, blocks, stream);
  }
  const dim3 rows(static_cast<unsigned>(args.heads), static_cast<unsigned>(sequences));
  launch_behind(fold_splits_kernel<kHeadDim>, "draft attention, folding of splits", rows, kFoldThreads, 0, stream,
                args);
}

// What lies behind the partial results where pages are chosen, for `pairs` (sequence, KV head).
struct ChoiceScratch {
  std::byte** pages = nullptr;
  float* scores = nullptr;
  int* tokens = nullptr;
  int stride = 0;
};
int choice_stride(int longest_tokens) {
  return ceil_div(ceil_div(longest_tokens, kPageTokens), 4) * 4;
}
size_t choice_bytes(size_t pairs, int stride) {
  return pairs * (static_cast<size_t>(stride) * (sizeof(std::byte*) + sizeof(float)) + sizeof(int));
}
ChoiceScratch place_choice(std::byte* scratch, size_t pairs, int stride) {
  const size_t entries = pairs * static_cast<size_t>(stride);
  auto** pages = reinterpret_cast<std::byte**>(scratch);
  auto* scores = reinterpret_cast<float*>(pages + entries);
  return {pages, scores, reinterpret_cast<int*>(scores + entries), stride};
}

size_t partial_floats(size_t partials, int head_dim) {
  return (partials * (static_cast<size_t>(head_dim) + 2) + 3) / 4 * 4;  // what follows is aligned to 16 bytes
}

}  // namespace

// Partial results of `pairs` (sequence, KV head, tile) are at most kWaves * kSlots + 2 pairs, of up to 8 heads each:
// cut_pages() makes a split at least pages * pairs / (kWaves * kSlots) long, and two splits may be short.
size_t draft_attention_scratch_bytes(const Limits& limits) {
  const int group = limits.heads / limits.shape.kv_heads;
  const size_t tiles = static_cast<size_t>(limits.shape.kv_heads) * static_cast<size_t>(head_tiles(group));
  const size_t pairs = static_cast<size_t>(limits.max_sequences) * tiles;
  const size_t partials = (size_t{kWaves} * kSlots + 2 * pairs) * static_cast<size_t>(std::min(group, kTileHeads));
  const size_t heads = static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.shape.kv_heads);
  return partial_floats(partials, limits.shape.head_dim) * sizeof(float) +
         choice_bytes(heads, choice_stride(limits.max_context_tokens));
}

void draft_attention(const AttentionArgs& args, const KvFormat& format, const StagedPass& pass, int longest_tokens,
                     int read_tokens, float* scratch, cudaStream_t stream) {
  const KvShape& shape = args.shape;
  const int head_dim = shape.head_dim;
  check(pass.rows == pass.count, "a draft pass has one row a sequence");
  check(args.heads % shape.kv_heads == 0, "query heads are shared evenly by the KV heads");
  if (pass.count == 0) {
    return;
  }
  DraftArgs draft{.q = args.q,
                  .sequences = pass.layer(args.layer),
                  .heads = args.heads,
                  .group = args.heads / shape.kv_heads,
                  .scale_log2 = args.scale * kLog2E,
                  .format = format,
                  .keys = key_pieces(format.key(), head_dim),
                  .values = value_pieces(format.value(), head_dim),
                  .kv_heads = shape.kv_heads,
                  .out = args.out,
                  .log_sum_exp = args.log_sum_exp};
  draft.head_tiles = head_tiles(draft.group);
  const bool chooses = format.choice.in_layer(args.layer);
  draft.cut = cut_pages(pass.count * shape.kv_heads * draft.head_tiles, chooses ? read_tokens : longest_tokens);
  const size_t partials = static_cast<size_t>(pass.count) * static_cast<size_t>(args.heads * draft.cut.count);
  draft.partials = scratch;
  draft.tops = reinterpret_cast<float2*>(scratch + partials * static_cast<size_t>(head_dim));
  if (chooses) {
    const ChoiceScratch choice = place_choice(
        reinterpret_cast<std::byte*>(scratch + partial_floats(partials, head_dim)),
        static_cast<size_t>(pass.count) * static_cast<size_t>(shape.kv_heads), choice_stride(longest_tokens));
    choose_pages({.shape = shape,
                  .heads = args.heads,
                  .q = args.q,
                  .sequences = draft.sequences,
                  .count = pass.count,
                  .format = format,
                  .scores = choice.scores,
                  .pages = choice.pages,
                  .tokens = choice.tokens,
                  .stride = choice.stride},
                 stream);
    draft.chosen = choice.pages;
    draft.chosen_tokens = choice.tokens;
    draft.chosen_stride = choice.stride;
  }
  for_head_dim(head_dim, [&](auto dim) { launch<decltype(dim)::kValue>(draft, shape.kv_heads, pass.count, stream); });
}

}  // namespace vericache::cuda
