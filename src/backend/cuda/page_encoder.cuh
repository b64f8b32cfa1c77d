// From a bf16 head page in shared memory to affine codes of 2, 4 and 8 bits in device memory (KIVI, Liu et al. 2024).
// Device code; a block of head_dim threads: a warp makes the codes of 32 channels of K and of 32 dims of V.
#pragma once

#include "backend/cuda/packed_layout.h"
#include "backend/cuda/warp_ops.cuh"

namespace vericache::cuda {

// A bf16 head page as it lies in memory, and what its codes are made from.
template <int kHeadDim>
struct SharedPage {
  uint4 keys[kHeadDim / 32][kPageTokens][4];        // (32 dims, token, 8 dims each)
  uint4 values[2][kHeadDim][4];                     // (32 tokens, dim, 8 tokens each)
  float2 key_codes[kHeadDim];                       // minimum, 1 / scale
  float2 value_codes[kPageTokens];                  // the same; or what codes by token are made from
  float2 value_ranges[kHeadDim / 32][kPageTokens];  // of the dims of a warp
};

struct Range {
  float low = kInfinity;
  float high = -kInfinity;
  __device__ void add(float x) {
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
  // Joins what the lane 16 away has seen.
  __device__ void join_halves() {
    low = fminf(low, __shfl_xor_sync(0xffffffffu, low, 16));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 16));
  }
};

// The smallest bf16 that is not below x, for x >= 0; NaN stays NaN.
__device__ inline uint32_t round_up(float x) {
  const uint32_t below = __float_as_uint(x) >> 16;
  return __uint_as_float(below << 16) < x ? below + 1 : below;
}

// Writes scale and minimum, and returns what codes are made from. Inputs that are not finite give codes of no meaning,
// and nothing worse: the result is only ever a draft. An empty range gives zeros.
__device__ inline float2 fit(const Range& range, int whole_steps, uint16_t* scale, uint16_t* minimum) {
  const auto steps = static_cast<float>(whole_steps);
  uint32_t stored[2] = {0, 0};
  if (range.low <= range.high) {
    stored[0] = round_up((range.high - range.low) / steps);
    stored[1] = __float_as_uint(range.low) >> 16;  // one of the values, so it needs no rounding
  }
  *scale = static_cast<uint16_t>(stored[0]);
  *minimum = static_cast<uint16_t>(stored[1]);
  const float step = __uint_as_float(stored[0] << 16);
  return make_float2(__uint_as_float(stored[1] << 16), step > 0 ? 1.0f / step : 0.0f);
}

__device__ inline uint32_t encode(float x, const float2& codes, float most) {
  return static_cast<uint32_t>(__float2int_rn(fminf(fmaxf((x - codes.x) * codes.y, 0.0f), most)));
}

// The codes of 8 values, one every `Bits` bits of a plane word (packed_layout.h); of 8 bits the high and the low
// halves.
struct Codes {
  uint32_t high = 0;  // 8 bits only
  uint32_t low = 0;
};
__device__ inline Codes encode8(const uint4& values, const float2 (&codes)[8], int bits) {
  const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  const float most = static_cast<float>((1 << bits) - 1);
  const int apart = bits == 2 ? 2 : 4;
  Codes out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t first = encode(first_of_pair(pairs[i]), codes[2 * i], most);
    const uint32_t second = encode(second_of_pair(pairs[i]), codes[2 * i + 1], most);
    const uint32_t pair = first | second << 16;
    out.low |= (pair & 0x000f000fu) << (apart * i);
    out.high |= (pair >> 4 & 0x000f000fu) << (apart * i);
  }
  return out;
}

__device__ inline void store4(std::byte* plane, int row, int lane, const uint32_t (&words)[4]) {
  reinterpret_cast<uint4*>(plane)[row * 32 + lane] = make_uint4(words[0], words[1], words[2], words[3]);
}

// rising_bits() of a pair of bf16, and its own inverse.
__device__ inline uint32_t rising_pair(uint32_t pair) {
  return pair ^ ((pair >> 15 & 0x00010001u) * 0x7fffu);
}

// What a warp does. Lane 4 g + c where codes are written, as packed_layout.h says.
template <int kHeadDim>
struct Encoder {
  SharedPage<kHeadDim>& page;
  int held;  // tokens of the page; the rest counts as absent
  int warp = static_cast<int>(threadIdx.x) / 32;
  int lane = static_cast<int>(threadIdx.x) % 32;

  // Ranges of the channels 32 warp ..: a lane takes two channels of every other token.
  __device__ void fit_keys(int bits, std::byte* out) {
    const int pair = lane % 16;
    const auto* words = reinterpret_cast<const uint32_t*>(page.keys[warp]);
    Range ranges[2];
    for (int token = lane / 16; token < held; token += 2) {
      const uint32_t word = words[token * 16 + pair];
      ranges[0].add(first_of_pair(word));
      ranges[1].add(second_of_pair(word));
    }
    ranges[0].join_halves();
    ranges[1].join_halves();
    const int channel = 32 * warp + 2 * pair + lane / 16;
    auto* affine = reinterpret_cast<uint16_t*>(out);
    page.key_codes[channel] =
        fit(lane < 16 ? ranges[0] : ranges[1], (1 << bits) - 1, affine + channel, affine + kHeadDim + channel);
    __syncwarp();
  }

  // Smallest and largest of the channels 32 warp .. (kv_view.h): a lane takes two channels of every other token.
  __device__ void bound_keys(std::byte* bounds) {
    const int pair = lane % 16;
    const auto* words = reinterpret_cast<const uint32_t*>(page.keys[warp]);
    auto* out = reinterpret_cast<uint32_t*>(bounds) + lane / 16 * (kHeadDim / 2) + 16 * warp + pair;
    for (int run = 0; run < kBoundRuns; ++run, out += kHeadDim) {
      const int first = min(run, max(held - 1, 0) / kBoundTokens) * kBoundTokens;
      uint32_t low = 0x7fff7fffu;
      uint32_t high = 0x80008000u;
      for (int token = first + lane / 16; token < min(held, first + kBoundTokens); token += 2) {
        const uint32_t rising = rising_pair(words[token * 16 + pair]);
        low = __vmins2(low, rising);
        high = __vmaxs2(high, rising);
      }
      low = __vmins2(low, __shfl_xor_sync(kAllLanes, low, 16));
      high = __vmaxs2(high, __shfl_xor_sync(kAllLanes, high, 16));
      *out = held > 0 ? rising_pair(lane < 16 ? low : high) : 0;
    }
  }

  __device__ void encode_keys(int bits, std::byte* planes) {
    const int g = lane / 4;
    const int c = lane % 4;
    float2 codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      codes[i] = page.key_codes[32 * warp + 8 * c + i];
    }
    uint32_t tiles[4] = {};  // of 2 bits: one word for the two rows of each tile
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t low[4];
      uint32_t high[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int token = 32 * half + score_token(b, g);
        Codes made;
        if (token < held) {
          made = encode8(page.keys[warp][token][c], codes, bits);
        }
        low[b] = made.low;
        high[b] = made.high;
        tiles[2 * half + b / 2] |= made.low << (8 * (b % 2));
      }
      if (bits == 8) {
        store4(planes, 2 * warp + half, lane, high);
        store4(planes + plane_bytes(4, kHeadDim), 2 * warp + half, lane, low);
      } else if (bits == 4) {
        store4(planes, 2 * warp + half, lane, low);
      }
    }
    if (bits == 2) {
      store4(planes, warp, lane, tiles);
    }
  }

  // Ranges of every token over the dims 32 warp ..: a lane takes two tokens of every other dim.
  __device__ void measure_values() {
    const int pair = lane % 16;
    for (int half = 0; half < 2; ++half) {
      const auto* words = reinterpret_cast<const uint32_t*>(page.values[half]);
      Range ranges[2];
      for (int dim = 32 * warp + lane / 16; dim < 32 * warp + 32; dim += 2) {
        const uint32_t word = words[dim * 16 + pair];
        ranges[0].add(first_of_pair(word));
        ranges[1].add(second_of_pair(word));
      }
      ranges[0].join_halves();
      ranges[1].join_halves();
      const Range& mine = lane < 16 ? ranges[0] : ranges[1];
      page.value_ranges[warp][32 * half + 2 * pair + lane / 16] = make_float2(mine.low, mine.high);
    }
  }

  // The whole block; measure_values() of all warps is done.
  __device__ void fit_values(int bits, std::byte* out) {
    auto* affine = reinterpret_cast<uint16_t*>(out);
    for (int token = static_cast<int>(threadIdx.x); token < kPageTokens; token += kHeadDim) {
      Range range;
      for (int i = 0; token < held && i < kHeadDim / 32; ++i) {
        range.low = fminf(range.low, page.value_ranges[i][token].x);
        range.high = fmaxf(range.high, page.value_ranges[i][token].y);
      }
      page.value_codes[token] = fit(range, (1 << bits) - 1, affine + token, affine + kPageTokens + token);
    }
  }

  // The dims 32 warp ..: two tiles of 16.
  __device__ void encode_values(int bits, std::byte* planes) {
    const int g = lane / 4;
    const int c = lane % 4;
    uint32_t low[2][4];  // (tile, 2 half + h): dim 16 tile + 8 h + g, 8 tokens of 32
    uint32_t high[2][4];
    uint32_t halves[4];  // of 2 bits: (2 tile + half), both dims in one word
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 codes[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        codes[i] = page.value_codes[32 * half + 8 * c + i];
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Codes made = encode8(page.values[half][32 * warp + 16 * tile + 8 * h + g][c], codes, bits);
          low[tile][2 * half + h] = made.low;
          high[tile][2 * half + h] = made.high;
        }
        halves[2 * tile + half] = low[tile][2 * half] | low[tile][2 * half + 1] << 8;
      }
    }
    if (bits == 2) {
      store4(planes, warp, lane, halves);
      return;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (bits == 8) {
        store4(planes, 2 * warp + tile, lane, high[tile]);
        store4(planes + plane_bytes(4, kHeadDim), 2 * warp + tile, lane, low[tile]);
      } else {
        store4(planes, 2 * warp + tile, lane, low[tile]);
      }
    }
  }
};

// 8 kHeadDim times 16 bytes: K or V of a bf16 page, by the kHeadDim threads of a block.
template <int kHeadDim>
__device__ void copy_part(const uint4* source, uint4* target) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    target[i * kHeadDim + static_cast<int>(threadIdx.x)] = source[i * kHeadDim + static_cast<int>(threadIdx.x)];
  }
}

}  // namespace vericache::cuda
