// KeyTile: the keys of 32 tokens of one KV head in the registers of a warp, and their products with eight queries at a
// time. Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/layout.h"
#include "backend/cuda/warp_ops.cuh"

namespace vericache::cuda {

constexpr int kTileTokens = 32;

// A head page of full KV: past, then tail.
__device__ inline const std::byte* full_head_page(const LayerKv& kv, int kv_head, int page) {
  const int past_pages = kv.tail_position / kPageTokens;
  const KvView& view = page < past_pages ? kv.past : kv.tail;
  return view
      .head_pages[static_cast<ptrdiff_t>(kv_head) * view.page_stride + (page < past_pages ? page : page - past_pages)];
}

// Lane 4 g + c.
template <int kHeadDim>
struct KeyTile {
  static constexpr int kGroups = kHeadDim / 32;
  int first;  // absolute, a multiple of 32
  int g;
  int c;
  uint4 keys[kGroups][4];  // 8 dims of token(0..3)

  __device__ void place(int first_token, int lane) {
    first = first_token;
    g = lane / 4;
    c = lane % 4;
  }
  __device__ int token(int i) const { return first + 8 * i + g; }

  __device__ void load(const LayerKv& kv, int kv_head) {
    const std::byte* from = full_head_page(kv, kv_head, first / kPageTokens);
#pragma unroll
    for (int dims = 0; dims < kGroups; ++dims) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        keys[dims][i] =
            *reinterpret_cast<const uint4*>(from + key_index(token(i) % kPageTokens, 32 * dims + 8 * c) * 2);
      }
    }
  }

  // query: the row (head_dim) of column g of eight. scores[i / 2][i % 2 * 2 + n] += token(i) times column 2 c + n.
  __device__ void products(const bf16* query, float (&scores)[2][4]) const {
#pragma unroll
    for (int dims = 0; dims < kGroups; ++dims) {
      const uint4 part = *reinterpret_cast<const uint4*>(query + 32 * dims + 8 * c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4& low = keys[dims][2 * i];
        const uint4& high = keys[dims][2 * i + 1];
        tensor_step(scores[i], low.x, high.x, low.y, high.y, part.x, part.y);
        tensor_step(scores[i], low.z, high.z, low.w, high.w, part.z, part.w);
      }
    }
  }

  // What the four lanes of a token hold of it, added.
  __device__ static float sum_columns(float own) {
    own += __shfl_xor_sync(kAllLanes, own, 1);
    own += __shfl_xor_sync(kAllLanes, own, 2);
    return own;
  }
  // The same, the largest of it.
  __device__ static float largest_column(float own) {
    own = fmaxf(own, __shfl_xor_sync(kAllLanes, own, 1));
    return fmaxf(own, __shfl_xor_sync(kAllLanes, own, 2));
  }
};

}  // namespace vericache::cuda
