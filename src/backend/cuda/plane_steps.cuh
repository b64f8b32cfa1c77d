// Products with codes that lie in planes (packed_layout.h), a plane at a time, as a warp of draft attention has them
// (draft_warp.cuh): 8 query heads as the columns of every step.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/packed_math.cuh"

namespace vericache::cuda {

// Adds the codes of a plane of K, of 4 bits or 2, times queries: rows of `scores` are tokens. scaled: pairs of the dims
// 32 group + 8 c .. + 7 of head g.
template <int kGroups>
__device__ inline void score_plane4(const std::byte* plane, uint32_t exponent, int lane,
                                    const uint32_t (&scaled)[kGroups][4], float (&scores)[4][4]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      read16(plane + ((group * 2 + half) * 32 + lane) * 16, words);
      uint32_t pairs[4][4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        unpack4(words[word], exponent, pairs[word]);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t(&low)[4] = pairs[2 * j];
          const uint32_t(&high)[4] = pairs[2 * j + 1];
          tensor_step(scores[2 * half + j], low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1],
                      scaled[group][2 * s], scaled[group][2 * s + 1]);
        }
      }
    }
  }
}

template <int kGroups>
__device__ inline void score_plane2(const std::byte* plane, int lane, const uint32_t (&scaled)[kGroups][4],
                                    float (&scores)[4][4]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    uint32_t words[4];
    read16(plane + (group * 32 + lane) * 16, words);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      uint32_t pairs[8];
      unpack2(words[tile], pairs);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        tensor_step(scores[tile], pairs[2 * s], pairs[4 + 2 * s], pairs[2 * s + 1], pairs[5 + 2 * s],
                    scaled[group][2 * s], scaled[group][2 * s + 1]);
      }
    }
  }
}

// Adds the codes of a plane of V times weights: rows of `out` are dims. scaled: of the tokens 32 u + 8 c .. + 7 of head
// g, four pairs each.
template <int kTiles>
__device__ inline void add_plane4(const std::byte* plane, uint32_t exponent, int lane, const uint32_t (&scaled)[8],
                                  float (&out)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t words[4];
    read16(plane + (tile * 32 + lane) * 16, words);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t low[4];
      uint32_t high[4];
      unpack4(words[2 * half], exponent, low);
      unpack4(words[2 * half + 1], exponent, high);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        tensor_step(out[tile], low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1], scaled[4 * half + 2 * s],
                    scaled[4 * half + 2 * s + 1]);
      }
    }
  }
}

template <int kTiles>
__device__ inline void add_plane2(const std::byte* plane, int lane, const uint32_t (&scaled)[8],
                                  float (&out)[kTiles][4]) {
#pragma unroll
  for (int tiles = 0; tiles < kTiles / 2; ++tiles) {
    uint32_t words[4];
    read16(plane + (tiles * 32 + lane) * 16, words);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int half = word % 2;
      uint32_t pairs[8];
      unpack2(words[word], pairs);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        tensor_step(out[2 * tiles + word / 2], pairs[2 * s], pairs[4 + 2 * s], pairs[2 * s + 1], pairs[5 + 2 * s],
                    scaled[4 * half + 2 * s], scaled[4 * half + 2 * s + 1]);
      }
    }
  }
}

}  // namespace vericache::cuda
