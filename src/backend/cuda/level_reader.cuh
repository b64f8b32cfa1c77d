// LevelReader: operands of tensor-core steps from non-uniform codes in chunks (chunk_layout.h): a permutation of bytes
// looks up the levels of four codes at once.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/packed_math.cuh"

namespace vericache::cuda {

// What a lane reads of a chunk's planes of 2 and of 1 bits, where codes of kBits bits have them.
template <int kBits>
struct NarrowPlanes {
  uint32_t two[4] = {};
  uint32_t one[2] = {};
  __device__ NarrowPlanes(const std::byte* chunk, int lane) {
    if constexpr ((kBits & 2) != 0) {
      read16(chunk + plane_in_chunk(kBits, 2) + lane * 16, two);
    }
    if constexpr ((kBits & 1) != 0) {
      const uint2 read = *reinterpret_cast<const uint2*>(chunk + plane_in_chunk(kBits, 1) + lane * 8);
      one[0] = read.x;
      one[1] = read.y;
    }
  }
};

// The bytes of a and b that the four low digits of `digits` name.
__device__ inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t digits) {
  return __byte_perm(a, b, digits);
}

// Reads codes of kBits bits as bf16: 128 + level. As ChunkReader.
template <int kBits>
class LevelReader {
 public:
  static constexpr int kCodeBits = kBits;
  static constexpr KvCode kCode = KvCode::nuq;
  static constexpr bool kByToken = false;

  struct Levels {
    uint32_t words[4];
    // at: the levels of a part; 16-byte aligned.
    __device__ explicit Levels(const uint8_t* at) { read16(reinterpret_cast<const std::byte*>(at), words); }
  };

  __device__ LevelReader(const std::byte* chunk, int lane, const Levels& levels)
      : chunk_(chunk), lane_(lane), levels_(levels), narrow_(chunk, lane) {}

  // Tiles (r, 0) and (r, 1): pairs of rows g and g + 8.
  template <int kR>
  __device__ void tiles(uint32_t (&pairs)[2][2][4]) const {
    uint32_t four[4] = {};
    if constexpr ((kBits & 4) != 0) {
      read16(chunk_ + plane_in_chunk(kBits, 4) + (kR * 32 + lane_) * 16, four);
    }
#pragma unroll
    for (int x = 0; x < 2; ++x) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        look_up(kBits == 4 ? four[2 * x + row] : digits(narrow_.two[2 * kR + x], narrow_.one[kR], x, row),
                pairs[x][row]);
      }
    }
  }

 private:
  // The codes of a run, four bits each: those of first values of pairs in the low half, of second ones in the high.
  __device__ static uint32_t digits(uint32_t two, uint32_t one, int x, int row) {
    uint32_t high = two >> (8 * row) & 0x00ff00ffu;
    high = (high | high << 4) & 0x0f0f0f0fu;
    high = (high | high << 2) & 0x33333333u;
    if constexpr (kBits == 2) {
      return high;
    }
    uint32_t low = one >> (4 * (2 * x + row)) & 0x000f000fu;
    low = (low | low << 6) & 0x03030303u;
    low = (low | low << 3) & 0x11111111u;
    return high << 1 | low;
  }

  // The levels of the four codes in the low half.
  __device__ uint32_t levels_of_half(uint32_t codes) const {
    const uint32_t(&words)[4] = levels_.words;
    if constexpr (kBits < 4) {
      return pick_bytes(words[0], words[1], codes);
    }
    // The highest bit of a digit would ask for the byte's sign.
    const uint32_t lower = pick_bytes(words[0], words[1], codes & 0x7777u);
    const uint32_t upper = pick_bytes(words[2], words[3], codes & 0x7777u);
    const uint32_t is_upper = pick_bytes(0x0000ff00u, 0, codes >> 3 & 0x1111u);
    return (lower & ~is_upper) | (upper & is_upper);
  }

  __device__ void look_up(uint32_t codes, uint32_t (&pairs)[4]) const {
    const uint32_t first = levels_of_half(codes);
    const uint32_t second = levels_of_half(codes >> 16);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      pairs[i] = select_or(pick_bytes(first, second, i | (4 + i) << 8), 0x007f007fu, kLowExponent);
    }
  }

  const std::byte* chunk_;
  int lane_;
  Levels levels_;
  NarrowPlanes<kBits> narrow_;
};

}  // namespace vericache::cuda
