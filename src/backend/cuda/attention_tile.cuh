// WarpRows: the rows of one warp of exact attention, the products of one page with them, the state of their softmax and
// how states are folded. Device code of attention.cu alone.
#pragma once

#include "backend/cuda/attention_ring.cuh"
#include "backend/cuda/layout.h"

namespace vericache::cuda {

// Queries of a warp's rows lie in shared memory as the lanes take them: (head_dim / 32, two steps, 16-row tiles,
// lanes), 16 bytes each, the A operand of one product.
template <int MTiles>
__device__ __forceinline__ int query_offset(int block, int step, int m, int lane) {
  return (((block * 2 + step) * MTiles + m) * 32 + lane) * 16;
}

// scores (tile of 8 tokens, accumulator) of the warp's rows with the 64 tokens of a page.
template <int HeadDim, int MTiles>
__device__ __forceinline__ void score_page(const std::byte* queries, const std::byte* keys, int lane,
                                           float (&scores)[MTiles][8][4]) {
  constexpr int kAbreast = 4 / MTiles;  // token tiles whose four products do not wait for each other
  const std::byte* key = keys + 2 * key_index(score_token(0, lane / 4), 8 * (lane % 4));
  const std::byte* query = queries + query_offset<MTiles>(0, 0, 0, lane);
#pragma unroll
  for (int m = 0; m < MTiles; ++m) {
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[m][tile][i] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int block = 0; block < HeadDim / 32; ++block) {
    uint4 q[2][MTiles];
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      q[0][m] = *reinterpret_cast<const uint4*>(query + query_offset<MTiles>(block, 0, m, 0));
      q[1][m] = *reinterpret_cast<const uint4*>(query + query_offset<MTiles>(block, 1, m, 0));
    }
#pragma unroll
    for (int first = 0; first < 8; first += kAbreast) {
      uint4 k[kAbreast];
#pragma unroll
      for (int i = 0; i < kAbreast; ++i) {
        k[i] = *reinterpret_cast<const uint4*>(key + 2 * key_index(score_token(first + i, 0), 32 * block));
      }
#pragma unroll
      for (int i = 0; i < kAbreast; ++i) {
#pragma unroll
        for (int m = 0; m < MTiles; ++m) {
          tensor_step(scores[m][first + i], q[0][m].x, q[0][m].y, q[0][m].z, q[0][m].w, k[i].x, k[i].y);
        }
      }
#pragma unroll
      for (int i = 0; i < kAbreast; ++i) {
#pragma unroll
        for (int m = 0; m < MTiles; ++m) {
          tensor_step(scores[m][first + i], q[1][m].x, q[1][m].y, q[1][m].z, q[1][m].w, k[i].z, k[i].w);
        }
      }
    }
  }
}

// acc (tile of 8 dims, accumulator) += weights (tile of 8 tokens, low and high row) times the values of a page.
template <int HeadDim, int MTiles>
__device__ __forceinline__ void add_values(const uint32_t (&weights)[MTiles][8][2], const std::byte* values, int lane,
                                           float (&acc)[MTiles][HeadDim / 8][4]) {
  constexpr int kAbreast = 4 / MTiles;
  const std::byte* value = values + 2 * value_index(8 * (lane % 4), lane / 4, HeadDim);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
#pragma unroll
    for (int first = 0; first < HeadDim / 8; first += kAbreast) {
      uint4 v[kAbreast];
#pragma unroll
      for (int i = 0; i < kAbreast; ++i) {
        v[i] = *reinterpret_cast<const uint4*>(value + 2 * value_index(32 * group, 8 * (first + i), HeadDim));
      }
#pragma unroll
      for (int i = 0; i < kAbreast; ++i) {
#pragma unroll
        for (int m = 0; m < MTiles; ++m) {
          const auto& w = weights[m];
          tensor_step(acc[m][first + i], w[4 * group][0], w[4 * group][1], w[4 * group + 1][0], w[4 * group + 1][1],
                      v[i].x, v[i].y);
        }
      }
#pragma unroll
      for (int i = 0; i < kAbreast; ++i) {
#pragma unroll
        for (int m = 0; m < MTiles; ++m) {
          const auto& w = weights[m];
          tensor_step(acc[m][first + i], w[4 * group + 2][0], w[4 * group + 2][1], w[4 * group + 3][0],
                      w[4 * group + 3][1], v[i].z, v[i].w);
        }
      }
    }
  }
}

// Turns the scores of one of a lane's rows (accumulators 2 half, 2 half + 1) into weights 2^(score * scale - top), and
// returns the factor that what was summed before must take. top follows the maximum with some slack, so that it seldom
// moves: weights up to 2^kSlack are as exact. A row without a visible token keeps its state.
__device__ __forceinline__ float weigh_row(float (&scores)[8][4], int half, float scale, float& top, float& sum) {
  constexpr float kSlack = 8;
  float most = -kInfinity;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    most = fmaxf(most, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
  }
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2)) * scale;
  const float before = top;
  top = most > before + kSlack ? most : before;
  const float factor = top == before ? 1.0f : exp2_approx(before - top);
  const float base = top == -kInfinity ? 0.0f : top;
  float added = 0;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      scores[tile][i] = exp2_approx(__fmaf_rn(scores[tile][i], scale, -base));
      added += scores[tile][i];
    }
  }
  sum = __fmaf_rn(sum, factor, added);
  return factor;
}

// How the state of a split joins the total of the splits before it: total * keep + split * add, sums and values alike.
struct Fold {
  float top;
  float keep;
  float add;
};
__device__ __forceinline__ Fold fold(float total_top, float split_top) {
  const float top = fmaxf(total_top, split_top);
  return {top, total_top == top ? 1.0f : exp2_approx(total_top - top),
          split_top == top ? 1.0f : exp2_approx(split_top - top)};
}
__device__ __forceinline__ float folded(const Fold& f, float total, float split) {
  return __fmaf_rn(split, f.add, __fmul_rn(total, f.keep));
}

// The sign of a zero is not told, since tokens that a row does not see may change it.
__device__ __forceinline__ float divided(float value, float inverse_sum) {
  return __fadd_rn(__fmul_rn(value, inverse_sum), 0.0f);
}
__device__ __forceinline__ float log_sum_exp_of(float top, float sum) {
  constexpr float kLn2 = 0.693147181f;
  return (top + log2f(sum)) * kLn2;
}

// The state of 16 MTiles rows. Of every 16-row tile a lane holds two rows, lane / 4 and lane / 4 + 8 ("low" and
// "high"), and of those the dims 8 t + 2 (lane % 4) and the one behind.
template <int HeadDim, int MTiles>
struct WarpRows {
  static constexpr int kRows = 16 * MTiles;
  float acc[MTiles][HeadDim / 8][4];
  float top[MTiles][2];  // in powers of two
  float sum[MTiles][2];  // this lane's part of it, until add_lanes()

  __device__ __forceinline__ void start_split() {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
#pragma unroll
      for (int t = 0; t < HeadDim / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[m][t][i] = 0.0f;
        }
      }
      top[m][0] = top[m][1] = -kInfinity;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // positions: of the warp's rows, the last token that each sees.
  __device__ __forceinline__ static void hide_unseen(float (&scores)[MTiles][8][4], const int* positions,
                                                     int first_token, int lane) {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      const int low = positions[16 * m + lane / 4] - first_token;
      const int high = positions[16 * m + lane / 4 + 8] - first_token;
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = score_token(tile, 2 * (lane % 4) + i % 2);
          scores[m][tile][i] = token > (i < 2 ? low : high) ? -kInfinity : scores[m][tile][i];
        }
      }
    }
  }

  __device__ __forceinline__ void weigh(float (&scores)[MTiles][8][4], float scale, uint32_t (&weights)[MTiles][8][2]) {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      const float low = weigh_row(scores[m], 0, scale, top[m][0], sum[m][0]);
      const float high = weigh_row(scores[m], 1, scale, top[m][1], sum[m][1]);
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
        weights[m][tile][0] = pack_pair(scores[m][tile][0], scores[m][tile][1]);
        weights[m][tile][1] = pack_pair(scores[m][tile][2], scores[m][tile][3]);
      }
      // A factor of 1 changes no bit: a row whose maximum stands does not notice that its neighbour's moves.
      if (__any_sync(kAllLanes, low != 1.0f || high != 1.0f)) {
#pragma unroll
        for (int t = 0; t < HeadDim / 8; ++t) {
          acc[m][t][0] *= low;
          acc[m][t][1] *= low;
          acc[m][t][2] *= high;
          acc[m][t][3] *= high;
        }
      }
    }
  }

  // Gives the four lanes of a row its whole sum.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(kAllLanes, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(kAllLanes, sum[m][half], 2);
      }
    }
  }
};

}  // namespace vericache::cuda
