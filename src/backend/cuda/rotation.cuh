// The rotation of rotation.h on a GPU: of a page in shared memory, of queries in registers, of finished sums.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/layout.h"
#include "backend/cuda/warp_ops.cuh"
#include "backend/rotation.h"

namespace vericache::cuda {

// One step of a sum over pairs of lanes: the lower lane gets the sum, the upper one the difference.
__device__ inline float mix_lanes(float x, int reach, unsigned lanes) {
  const float other = __shfl_xor_sync(lanes, x, reach);
  // The product is exact: one instruction for the sum and the difference.
  return fmaf((static_cast<int>(threadIdx.x) & reach) == 0 ? 1.0f : -1.0f, x, other);
}

// x[j] is the dim 32 j + lane of one token.
template <int kHeadDim>
__device__ void rotate_lanes(float (&x)[kHeadDim / 32]) {
  constexpr int kBlock = rotation_block(kHeadDim);
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
#pragma unroll
    for (int reach = 1; reach < 32; reach *= 2) {
      x[j] = mix_lanes(x[j], reach, kAllLanes);
    }
  }
#pragma unroll
  for (int reach = 1; reach < kBlock / 32; reach *= 2) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      if ((j & reach) == 0) {
        const float a = x[j];
        const float b = x[j + reach];
        x[j] = a + b;
        x[j + reach] = a - b;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    x[j] *= rotation_scale(kBlock);
  }
}

// A bf16 head page in shared memory, as layout.h says, in place. The whole block of kHeadDim threads.
template <int kHeadDim>
__device__ void rotate_page(uint16_t* keys, uint16_t* values) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int i = warp; i < 2 * kPageTokens; i += kHeadDim / 32) {
    const int token = i / 2;
    uint16_t* part = i % 2 == 0 ? keys : values;
    float x[kHeadDim / 32];
    size_t at[kHeadDim / 32];
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      at[j] = i % 2 == 0 ? key_index(token, 32 * j + lane) : value_index(token, 32 * j + lane, kHeadDim);
      x[j] = first_of_pair(part[at[j]]);
    }
    rotate_lanes<kHeadDim>(x);
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      part[at[j]] = static_cast<uint16_t>(pack_pair(x[j], x[j]));
    }
  }
}

// Eight vectors, as a warp holds queries and rows of keys: x[i] of lane 4 g + c are the dims 32 i + 8c .. + 7 of vector
// g.
template <int kHeadDim>
__device__ void rotate_eight(float (&x)[kHeadDim / 32][8]) {
  constexpr int kBlock = rotation_block(kHeadDim);
#pragma unroll
  for (int group = 0; group < kHeadDim / 32; ++group) {
#pragma unroll
    for (int reach = 1; reach < 8; reach *= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((i & reach) == 0) {
          const float a = x[group][i];
          const float b = x[group][i + reach];
          x[group][i] = a + b;
          x[group][i + reach] = a - b;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[group][i] = mix_lanes(x[group][i], 1, kAllLanes);  // c is the lane's two low bits
      x[group][i] = mix_lanes(x[group][i], 2, kAllLanes);
    }
  }
#pragma unroll
  for (int reach = 1; reach < kBlock / 32; reach *= 2) {
#pragma unroll
    for (int group = 0; group < kHeadDim / 32; ++group) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((group & reach) == 0) {
          const float a = x[group][i];
          const float b = x[group + reach][i];
          x[group][i] = a + b;
          x[group + reach][i] = a - b;
        }
      }
    }
  }
#pragma unroll
  for (int group = 0; group < kHeadDim / 32; ++group) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[group][i] *= rotation_scale(kBlock);
    }
  }
}

// The same sums of pairs of bf16, each rounded to bf16 and none scaled. sum_eight: x[i][k] of lane 4 g + c are the dims
// 32 i + 8c + 2k, + 1 of vector g. sum_lanes: x[j] are the dim 32 j + lane of as many vectors.
__device__ inline uint32_t mix_lane_pairs(uint32_t x, int reach) {
  const uint32_t other = __shfl_xor_sync(kAllLanes, x, reach);
  return multiply_add_pairs(x, (static_cast<int>(threadIdx.x) & reach) == 0 ? 0x3f803f80u : 0xbf80bf80u, other);
}
__device__ inline void mix_pairs(uint32_t& a, uint32_t& b) {
  const uint32_t sum = add_pairs(a, b);
  b = multiply_add_pairs(b, 0xbf80bf80u, a);
  a = sum;
}
template <int kRows, int kPairs>
__device__ inline void sum_rows(uint32_t (&x)[kRows][kPairs], int rows) {
#pragma unroll
  for (int reach = 1; reach < rows; reach *= 2) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if ((j & reach) == 0) {
          mix_pairs(x[j][i], x[j + reach][i]);
        }
      }
    }
  }
}
template <int kHeadDim>
__device__ void sum_eight(uint32_t (&x)[kHeadDim / 32][4]) {
#pragma unroll
  for (int group = 0; group < kHeadDim / 32; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[group][i] = multiply_add_pairs(x[group][i], 0xbf803f80u, __byte_perm(x[group][i], 0, 0x1032));
    }
    mix_pairs(x[group][0], x[group][1]);
    mix_pairs(x[group][2], x[group][3]);
    mix_pairs(x[group][0], x[group][2]);
    mix_pairs(x[group][1], x[group][3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[group][i] = mix_lane_pairs(mix_lane_pairs(x[group][i], 1), 2);
    }
  }
  sum_rows(x, rotation_block(kHeadDim) / 32);
}
template <int kHeadDim, int kPairs>
__device__ void sum_lanes(uint32_t (&x)[kHeadDim / 32][kPairs]) {
#pragma unroll
  for (int reach = 1; reach < 32; reach *= 2) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        x[j][i] = mix_lane_pairs(x[j][i], reach);
      }
    }
  }
  sum_rows(x, rotation_block(kHeadDim) / 32);
}

// Queries as a warp of draft attention holds them: q[i] are pairs of those dims.
template <int kHeadDim>
__device__ void rotate_queries(uint32_t (&q)[kHeadDim / 32][4]) {
  float x[kHeadDim / 32][8];
#pragma unroll
  for (int group = 0; group < kHeadDim / 32; ++group) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[group][i] = i % 2 == 0 ? first_of_pair(q[group][i / 2]) : second_of_pair(q[group][i / 2]);
    }
  }
  rotate_eight<kHeadDim>(x);
#pragma unroll
  for (int group = 0; group < kHeadDim / 32; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q[group][i] = pack_pair(x[group][2 * i], x[group][2 * i + 1]);
    }
  }
}

// A row of sums, four dims a lane; lanes 0 .. kHeadDim / 4 - 1 of one warp call, and no others.
template <int kHeadDim>
__device__ float4 rotate_sums(const float4& sums) {
  constexpr int kBlock = rotation_block(kHeadDim);
  constexpr unsigned kLanes = kHeadDim == 128 ? kAllLanes : (1u << (kHeadDim / 4 % 32)) - 1;
  float x[4] = {sums.x + sums.y, sums.x - sums.y, sums.z + sums.w, sums.z - sums.w};
  const float first[2] = {x[0], x[1]};
  x[0] = first[0] + x[2];
  x[1] = first[1] + x[3];
  x[2] = first[0] - x[2];
  x[3] = first[1] - x[3];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int reach = 1; reach < kBlock / 4; reach *= 2) {
      x[i] = mix_lanes(x[i], reach, kLanes);
    }
    x[i] *= rotation_scale(kBlock);
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

}  // namespace vericache::cuda
