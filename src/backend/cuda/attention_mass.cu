// Attention mass of every token under the last query rows of a sequence.
// A warp takes 32 tokens of one KV head, whose keys stay in its registers, and meets the rows with their query heads 8
// at a time, in rising order.
#include <cuda_runtime.h>

#include "backend/cuda/ops.h"
#include "backend/cuda/packed_layout.h"
#include "backend/cuda/warp_ops.cuh"
#include "base/check.h"

namespace vericache::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kWarpTokens = 32;
constexpr int kBlockTokens = kWarps * kWarpTokens;
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
  const int slot = (args.position + row) % args.queries.capacity * args.heads + kv_head * group + column % group;
  return {slot, args.position + row, args.queries.log_sum_exp[slot] * kLog2E};
}

// 32 tokens. Lane 4 g + c.
template <int kHeadDim>
struct Tokens {
  static constexpr int kGroups = kHeadDim / 32;
  int first;  // absolute
  int g;
  int c;
  uint4 keys[kGroups][4];  // 8 dims of token 8 i + g
  float mass[4] = {};      // of token 8 i + g, from the columns 2 c and 2 c + 1 of every eight

  __device__ void load(const LayerKv& kv, int kv_head) {
    const int page = first / kPageTokens;
    const int past_pages = kv.tail_position / kPageTokens;
    const KvView& view = page < past_pages ? kv.past : kv.tail;
    const std::byte* from = view.head_pages[static_cast<ptrdiff_t>(kv_head) * view.page_stride +
                                            (page < past_pages ? page : page - past_pages)];
#pragma unroll
    for (int dims = 0; dims < kGroups; ++dims) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first % kPageTokens + 8 * i + g;
        keys[dims][i] = *reinterpret_cast<const uint4*>(from + key_index(token, 32 * dims + 8 * c) * 2);
      }
    }
  }

  // Eight columns, whose queries lie in q: (slot, head_dim).
  __device__ void meet(const Column* columns, const bf16* q, float scale_log2) {
    const Column& mine = columns[g];
    float scores[2][4] = {};
#pragma unroll
    for (int dims = 0; dims < kGroups; ++dims) {
      const uint4 query =
          *reinterpret_cast<const uint4*>(q + static_cast<size_t>(mine.slot) * kHeadDim + 32 * dims + 8 * c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4& low = keys[dims][2 * i];
        const uint4& high = keys[dims][2 * i + 1];
        tensor_step(scores[i], low.x, high.x, low.y, high.y, query.x, query.y);
        tensor_step(scores[i], low.z, high.z, low.w, high.w, query.z, query.w);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Column& column = columns[2 * c + n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2_approx(fmaf(scores[i / 2][i % 2 * 2 + n], scale_log2, -column.log2_sum));
        mass[i] += first + 8 * i + g <= column.position ? weight : 0.0f;
      }
    }
  }

  __device__ void write(float* out, int tokens) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mass[i] += __shfl_xor_sync(0xffffffffu, mass[i], 1);
      mass[i] += __shfl_xor_sync(0xffffffffu, mass[i], 2);
      const int token = first + 8 * i + g;
      if (i == c && token < tokens) {
        out[token] = mass[i];
      }
    }
  }
};

// Grid (blocks of tokens, KV heads).
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_mass_kernel(MassArgs args) {
  __shared__ Column columns[kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int group = args.heads / args.shape.kv_heads;
  Tokens<kHeadDim> tokens;
  tokens.first = static_cast<int>(blockIdx.x) * kBlockTokens + thread / 32 * kWarpTokens;
  tokens.g = thread % 32 / 4;
  tokens.c = thread % 4;
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
      tokens.meet(columns + tile, args.queries.q, args.scale * kLog2E);
    }
  }
  if (any) {
    tokens.write(args.mass + static_cast<size_t>(kv_head) * args.tokens, args.tokens);
  }
}

template <int kHeadDim>
void launch(const MassArgs& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((args.tokens + kBlockTokens - 1) / kBlockTokens),
                    static_cast<unsigned>(args.shape.kv_heads));
  attention_mass_kernel<kHeadDim><<<blocks, kThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "attention_mass");
}

}  // namespace

void attention_mass(const MassArgs& args, cudaStream_t stream) {
  check(args.rows <= args.queries.capacity, "the queries that vote stand in their ring");
  check(args.kv.past.format.exact() && args.kv.tail.format.exact(), "mass is that of the full KV");
  if (args.tokens == 0) {
    return;
  }
  switch (args.shape.head_dim) {
    case 32:
      return launch<32>(args, stream);
    case 64:
      return launch<64>(args, stream);
    case 96:
      return launch<96>(args, stream);
    case 128:
      return launch<128>(args, stream);
    default:
      check(false, "attention mass runs for head dims 32, 64, 96 and 128");
  }
}

}  // namespace vericache::cuda
