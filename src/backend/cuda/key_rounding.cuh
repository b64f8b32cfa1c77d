// Codes of rotated keys by LDLQ (RoundingArgs in kernels.h): a block of 16 channels at a time, from the last one on.
// Device code; a block of head_dim threads: a warp takes 16 tokens at a time.
#pragma once

#include "backend/cuda/page_encoder.cuh"
#include "base/bf16.h"

namespace vericache::cuda {

// Puts codes in the place of a page's keys, for which fit_keys() has written scales and minima to `affine`; matrix: of
// the head. page.values is lost. All threads of the block, behind a barrier and before one.
template <int kHeadDim>
__device__ void round_keys(SharedPage<kHeadDim>& page, int bits, const uint16_t* affine, const bf16* matrix) {
  constexpr int kChannels = 16;
  constexpr int kTokens = 16;
  constexpr int kWarps = kHeadDim / 32;
  __shared__ float taken[kWarps][kChannels][kTokens + 1];  // from the channels of other blocks
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const auto most = static_cast<float>((1 << bits) - 1);
  auto* const keys = reinterpret_cast<uint16_t*>(page.keys);
  auto* const errors = reinterpret_cast<uint16_t*>(page.values);  // (tokens, dims), bf16
  static_assert(sizeof(page.values) >= sizeof(uint16_t) * kPageTokens * kHeadDim);
  const auto pair_of = [&](const void* row, int dim) {
    return *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(row) + dim);
  };
  for (int first = kTokens * warp; first < kPageTokens; first += kTokens * kWarps) {
#pragma unroll 1
    for (int begin = kHeadDim - kChannels; begin >= 0; begin -= kChannels) {
      float sums[2][4] = {};
      const bf16* const rows[2] = {matrix + (begin + g) * kHeadDim, matrix + (begin + g + 8) * kHeadDim};
#pragma unroll 1
      for (int from = begin + kChannels; from < kHeadDim; from += kChannels) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint16_t* token = errors + (first + 8 * tile + g) * kHeadDim;
          tensor_step(sums[tile], pair_of(rows[0], from + 2 * c), pair_of(rows[1], from + 2 * c),
                      pair_of(rows[0], from + 2 * c + 8), pair_of(rows[1], from + 2 * c + 8),
                      pair_of(token, from + 2 * c), pair_of(token, from + 2 * c + 8));
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          taken[warp][g + i / 2 * 8][8 * tile + 2 * c + i % 2] = sums[tile][i];
        }
      }
      __syncwarp();
      if (lane < kTokens) {
        const int token = first + lane;
        float error[kChannels];
#pragma unroll
        for (int i = kChannels - 1; i >= 0; --i) {
          const int dim = begin + i;
          const bf16* shares = matrix + dim * kHeadDim + begin;
          const float2 codes = page.key_codes[dim];
          uint16_t& key = keys[key_index(token, dim)];
          const float x = first_of_pair(key);
          float wanted = x + taken[warp][i][lane];
#pragma unroll
          for (int j = i + 1; j < kChannels; ++j) {
            wanted = fmaf(first_of_pair(shares[j].bits), error[j], wanted);
          }
          const auto code = static_cast<float>(encode(wanted, codes, most));
          error[i] = x - fmaf(code, first_of_pair(affine[dim]), codes.x);
          key = static_cast<uint16_t>(pack_pair(code, 0.0f));
          errors[token * kHeadDim + dim] = static_cast<uint16_t>(pack_pair(error[i], 0.0f));
        }
      }
      __syncwarp();
    }
  }
  __syncthreads();
  page.key_codes[threadIdx.x] = make_float2(0.0f, 1.0f);  // they are codes as they are
}

// The same behind fit_keys(out); where there is no matrix, the keys stay what they are.
template <int kHeadDim>
__device__ void round_keys_by(SharedPage<kHeadDim>& page, int bits, const bf16* matrix, const std::byte* out) {
  if (matrix != nullptr) {
    __syncthreads();
    round_keys(page, bits, reinterpret_cast<const uint16_t*>(out), matrix);
    __syncthreads();
  }
}

}  // namespace vericache::cuda
