// Attention of draft rows, one a sequence, over resident KV as it is stored, then the bf16 tail.
// A block takes one split of one KV head's pages and up to 8 of the query heads that share them; its warps take pages
// in turn and join their sums. The block that is done last folds the splits, in their order.
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

__host__ __device__ constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Splits of a pair (sequence, tile of heads): as many for its past as fill the slots, and one for its tail, which may
// take more of them.
struct SplitLimits {
  int pages = 0;  // of past and tail together, at most
  int past = 1;
  int tail_pages = kWarps;  // of a split of the tail, which is bf16: no more bytes than a split of past
  __host__ __device__ constexpr int all() const { return past + 1; }
};
SplitLimits limit_splits(int pairs, int longest_tokens, const KvFormat& format) {
  const int pages = ceil_div(longest_tokens, kPageTokens) + 1;  // past and tail may both end within a page
  const bool one_wave = ceil_div(pages * pairs, kSlots) <= kOneWavePages;
  const int splits = one_wave ? std::max(1, kSlots / pairs) : ceil_div(kWaves * kSlots, pairs);
  return {pages, splits, std::max(kWarps, ceil_div(pages * (format.key_bits + format.value_bits), 2 * 16 * splits))};
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
  SplitLimits splits{};
  std::byte* const* chosen =
      nullptr;  // (sequences, KV heads, chosen_stride): the pages of past that are read; null: all
  const int* chosen_tokens = nullptr;  // (sequences, KV heads): that they hold
  int chosen_stride = 0;
  int kv_heads = 0;
  int* counts = nullptr;      // (sequences, tiles of heads): splits that are done
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

// How a pair is cut, evenly: the splits of past come first, then those of the tail.
struct Cut {
  int past_pages = 0;  // of a split
  int tail_pages = 0;
  int past_splits = 0;
  int splits = 0;
};
__device__ inline Cut cut_pages(const SplitLimits& limits, int past_tokens, int tail_tokens) {
  const int past = pages_of(past_tokens);
  const int tail = pages_of(tail_tokens);
  if (past + tail > limits.pages) {
    __trap();  // a sequence longer than the caller said
  }
  const int tail_splits = min(limits.past, ceil_div(tail, limits.tail_pages));
  const int past_splits = max(1, min(limits.past + 1 - tail_splits, ceil_div(past, kWarps)));
  Cut cut{.past_pages = max(1, ceil_div(past, past_splits)), .tail_pages = ceil_div(tail, tail_splits)};
  cut.past_splits = ceil_div(past, cut.past_pages);
  cut.splits = cut.past_splits + ceil_div(tail, cut.tail_pages);
  return cut;
}

// A run behind the last split is empty.
__device__ inline Run find_run(const DraftArgs& args, const Cut& cut, int index, int head, int split) {
  const SequenceRows& sequence = args.sequences[index];
  const bool tail = split >= cut.past_splits;
  const int tokens = tail ? tail_tokens(sequence) : past_tokens(args, index, head);
  const int pages = tail ? cut.tail_pages : cut.past_pages;
  const int first = (tail ? split - cut.past_splits : split) * pages;
  const KvView& tail_view = sequence.kv.tail;
  return {tail ? tail_view.head_pages + static_cast<ptrdiff_t>(head) * tail_view.page_stride
               : past_pages(args, index, head),
          first, min(pages_of(tokens), first + pages), tokens, tail};
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
        (static_cast<size_t>(blockIdx.y) * args.heads + first_head + head) * args.splits.all() + blockIdx.z;
    args.partials[partial * kHeadDim + dim] = out;
    if (dim == 0) {
      args.tops[partial] = make_float2(top, sum);
    }
  }
}

__device__ inline float4 add(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The splits of a query head of a sequence become a row of the output; by one warp.
template <int kHeadDim>
__device__ void fold_splits(const DraftArgs& args, const Cut& cut, int head) {
  constexpr int kLanes = kHeadDim / 4;  // four dims each
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const size_t first = (static_cast<size_t>(blockIdx.y) * args.heads + head) * args.splits.all();
  const float2* tops = args.tops + first;
  float top = -kInfinity;
  for (int i = lane; i < cut.splits; i += 32) {
    top = fmaxf(top, __ldcg(tops + i).x);
  }
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, reach));
  }
  if (lane >= kLanes) {
    return;
  }
  float sum = 0;
  const auto sum_of = [&](int begin, int end) {
    const auto* partials = reinterpret_cast<const float4*>(args.partials) + first * kLanes + lane;
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = begin; i < end; ++i) {
      const float2 split_top = __ldcg(tops + i);
      const float4 split = __ldcg(partials + static_cast<size_t>(i) * kLanes);
      const float weight = exp2_approx(split_top.x - top);
      sum = fmaf(split_top.y, weight, sum);
      out = make_float4(fmaf(split.x, weight, out.x), fmaf(split.y, weight, out.y), fmaf(split.z, weight, out.z),
                        fmaf(split.w, weight, out.w));
    }
    return out;
  };
  const float4 past = sum_of(0, cut.past_splits);
  const float4 tail = sum_of(cut.past_splits, cut.splits);
  const float4 out = add(args.format.rotated ? rotate_sums<kHeadDim>(past) : past, tail);
  const size_t row = static_cast<size_t>(args.sequences[blockIdx.y].first_row) * args.heads + head;
  const float inverse = 1.0f / sum;
  reinterpret_cast<uint2*>(args.out + row * kHeadDim)[lane] =
      make_uint2(pack_pair(out.x * inverse, out.y * inverse), pack_pair(out.z * inverse, out.w * inverse));
  if (lane == 0 && args.log_sum_exp != nullptr) {
    args.log_sum_exp[row] = (top + log2f(sum)) * kLn2;
  }
}

// Counts the splits of this block's pair that are done; true in the block of the last one, to which the partial results
// of all are there. The count is zero again then.
__device__ inline bool last_of_pair(const DraftArgs& args, int splits) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int& count = args.counts[static_cast<ptrdiff_t>(blockIdx.y) * gridDim.x + blockIdx.x];
    last = atomicAdd(&count, 1) == splits - 1;
    if (last) {
      count = 0;
    }
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Grid (head tiles, sequences, splits): what little does not fit one wave is the tails, which are short.
template <int kHeadDim, bool kChunked>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) draft_attention_kernel(DraftArgs args) {
  using Ring = typename DraftWarp<kHeadDim, kChunked>::Ring;
  extern __shared__ __align__(128) std::byte shared[];
  const auto index = static_cast<int>(blockIdx.y);
  const SequenceRows& sequence = args.sequences[index];
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
  const Cut cut = cut_pages(args.splits, past_tokens(args, index, kv_head), tail_tokens(sequence));
  const Run run = find_run(args, cut, index, kv_head, static_cast<int>(blockIdx.z));
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
  if (last_of_pair(args, cut.splits)) {
    for (int head = warp_index; head < heads; head += kWarps) {
      fold_splits<kHeadDim>(args, cut, first_head + head);
    }
  }
}

template <int kHeadDim, bool kChunked>
void launch_splits(const DraftArgs& args, dim3 blocks, cudaStream_t stream) {
  const size_t bytes = shared_bytes<kHeadDim, kChunked>();
  const auto kernel = draft_attention_kernel<kHeadDim, kChunked>;
  allow_shared(kernel, bytes, "draft attention");
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "shared memory of draft attention");
  launch_behind(kernel, "draft attention", blocks, kThreads, bytes, stream, args);
}

template <int kHeadDim>
void launch(const DraftArgs& args, int kv_heads, int sequences, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(kv_heads * args.head_tiles), static_cast<unsigned>(sequences),
                    static_cast<unsigned>(args.splits.all()));
  if (chunked(args.format.key()) || chunked(args.format.value())) {
    launch_splits<kHeadDim, true>(args, blocks, stream);
  } else {
    launch_splits<kHeadDim, false>(args, blocks, stream);
  }
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

// Partial results of `pairs` (sequence, tile of heads) are at most those of kWaves * kSlots + 2 pairs splits, of up to
// 8 heads each, as limit_splits() rounds up to one of past and adds one.
size_t draft_attention_scratch_bytes(const Limits& limits) {
  const int group = limits.heads / limits.shape.kv_heads;
  const size_t pairs = draft_attention_counts(limits);
  const size_t partials = (size_t{kWaves} * kSlots + 2 * pairs) * static_cast<size_t>(std::min(group, kTileHeads));
  const size_t heads = static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.shape.kv_heads);
  return partial_floats(partials, limits.shape.head_dim) * sizeof(float) +
         choice_bytes(heads, choice_stride(limits.max_context_tokens));
}

size_t draft_attention_counts(const Limits& limits) {
  return static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.shape.kv_heads) *
         static_cast<size_t>(head_tiles(limits.heads / limits.shape.kv_heads));
}

void draft_attention(const AttentionArgs& args, const KvFormat& format, const StagedPass& pass, int longest_tokens,
                     int read_tokens, float* scratch, int* counts, cudaStream_t stream) {
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
  draft.splits =
      limit_splits(pass.count * shape.kv_heads * draft.head_tiles, chooses ? read_tokens : longest_tokens, format);
  const size_t partials = static_cast<size_t>(pass.count) * static_cast<size_t>(args.heads * draft.splits.all());
  draft.counts = counts;
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
