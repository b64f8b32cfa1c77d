// Rows of an encoded block that lies in shared memory (residual_code.h), read by a warp at a time.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/residual_row.cuh"

namespace vericache::cuda {

// A field in a word, for tables: top and sign in the low half, its bits in the third byte, in the fourth whether the
// sign is one of them.
__device__ inline uint32_t pack_field(const ResidualField& field) {
  return field.top | (field.negative ? 0x8000u : 0) | static_cast<uint32_t>(field.bits()) << 16 |
         (field.either_sign ? 1u << 24 : 0);
}
// The same of interval_field(), without a branch.
__device__ inline uint32_t pack_interval_field(float first, float last, float scale, float minimum) {
  const float low = minimum + first * scale;
  const float high = minimum + last * scale;
  const uint32_t pair = residual_round(low, high);
  const uint32_t either = (pair << 16 ^ pair) >> 31;
  const uint32_t magnitude_low = pair & 0x7fffu;
  const uint32_t magnitude_high = pair >> 16 & 0x7fffu;
  const uint32_t top = max(magnitude_low, magnitude_high);
  const uint32_t bottom = min(magnitude_low, magnitude_high) & (either - 1);
  const uint32_t bits = min(32u - static_cast<uint32_t>(__clz(static_cast<int>(top - bottom))), uint32_t{kOpenBits});
  const uint32_t packed = top + (pair >> 16 & 0x8000u) + (bits << 16) + either * 0x1010000u;
  return low <= high ? packed : pack_field({});
}
// And of affine_field().
__device__ inline uint32_t pack_affine_field(uint32_t code, float scale, float minimum) {
  const auto step = static_cast<float>(code);
  return pack_interval_field(step - 0.5f, step + 0.5f, scale, minimum);
}
__device__ inline uint32_t pack_residual_field(const KvPart& part, uint32_t code, const ResidualGroup& group) {
  const float scale = float_of_bits(group.first << 16);
  if (part.code == KvCode::affine) {
    return pack_affine_field(code, scale, float_of_bits(group.second << 16));
  }
  if (part.code == KvCode::nuq) {
    return pack_interval_field(nuq_low(group.levels, code), nuq_high(group.levels, code, part.bits), scale,
                               float_of_bits(group.second << 16));
  }
  return part.code == KvCode::int8
             ? pack_affine_field(static_cast<uint32_t>(int8_of(code) + 128), scale, -128.0f * scale)
             : pack_field(residual_field(part, code, group));
}
__device__ inline int packed_bits(uint32_t field) {
  return static_cast<int>(__byte_perm(field, 0, 0x4442));
}

__device__ inline uint32_t low_ones(int count) {
  uint32_t mask;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(mask) : "r"(count));
  return mask;
}

// Whatever the block holds, nothing outside its memory is read: a place beyond it is taken for its last.
struct BlockReader {
  const uint32_t* words;
  uint32_t most;  // the last word behind which two more are there

  // 64 bits.
  __device__ void window(uint32_t at, uint32_t& low, uint32_t& high) const {
    const uint32_t* from = words + min(at / 32, most);
    const uint32_t middle = from[1];
    low = __funnelshift_r(from[0], middle, at % 32);
    high = __funnelshift_r(middle, from[2], at % 32);
  }
  __device__ uint32_t half(uint32_t index) const { return words[min(index / 2, most)] >> (16 * (index % 2)) & 0xffffu; }
  __device__ uint32_t byte(uint32_t index) const { return words[min(index / 4, most)] >> (8 * (index % 4)) & 0xffu; }
};

// The low halves of the values.
__device__ inline uint4 join_halves(const uint32_t (&values)[kLaneValues]) {
  return make_uint4(__byte_perm(values[0], values[1], 0x5410), __byte_perm(values[2], values[3], 0x5410),
                    __byte_perm(values[4], values[5], 0x5410), __byte_perm(values[6], values[7], 0x5410));
}

__device__ inline uint4 read_raw(const BlockReader& block, uint32_t begin, int lane) {
  uint32_t values[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    values[i] = block.half(begin + static_cast<uint32_t>(lane * kLaneValues + i));
  }
  return join_halves(values);
}

// fields: packed.
__device__ inline uint4 read_coded(const BlockReader& block, uint32_t begin, const uint32_t (&fields)[kLaneValues]) {
  static_assert(kLaneValues == 8 && 4 * kMostFieldBits <= 64 && 3 * kMostFieldBits < 32);
  constexpr uint32_t kEscape = (1u << kOpenBits) - 1;
  int bits[2] = {0, 0};  // of the values 0 .. 3 and 4 .. 7
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    bits[i / 4] += packed_bits(fields[i]);
  }
  int total;
  const uint32_t first = begin * 16 + static_cast<uint32_t>(sum_below(bits[0] + bits[1], total));
  uint32_t values[kLaneValues];
  uint32_t below[kLaneValues];
  uint32_t most = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t low;
    uint32_t high;
    block.window(first + static_cast<uint32_t>(half == 0 ? 0 : bits[0]), low, high);
    int at = 0;
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      const uint32_t either = fields[i] >> 24;
      const uint32_t coded = __funnelshift_r(low, high, static_cast<uint32_t>(at)) & low_ones(packed_bits(fields[i]));
      below[i] = coded >> either;
      // What the subtraction borrows stands above the value's 16 bits.
      values[i] = fields[i] + (coded & either) * 0x8000u - below[i];
      most = max(most, below[i]);
      at += packed_bits(fields[i]);
    }
  }
  if (__any_sync(kAllLanes, most >= kEscape)) {
    int own = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      own += below[i] == kEscape ? 1 : 0;
    }
    int escapes;
    uint32_t next = begin + (static_cast<uint32_t>(total) + 15) / 16 + static_cast<uint32_t>(sum_below(own, escapes));
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      if (below[i] == kEscape) {
        values[i] = block.half(next++);
      }
    }
  }
  return join_halves(values);
}

__device__ inline uint4 read_lossless(const BlockReader& block, uint32_t begin, int lane) {
  static_assert(4 * kLosslessBits <= 64);
  const uint32_t base = block.half(begin);
  const uint32_t first = (begin + 1) * 16 + static_cast<uint32_t>(lane * kLaneValues * kLosslessBits);
  uint32_t coded[kLaneValues];
  int own = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t low;
    uint32_t high;
    block.window(first + static_cast<uint32_t>(half * 4 * kLosslessBits), low, high);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Of 44 bits the last value begins at the 33rd.
      const uint32_t window = j < 3 ? __funnelshift_r(low, high, static_cast<uint32_t>(j * kLosslessBits))
                                    : high >> (3 * kLosslessBits - 32);
      const int i = 4 * half + j;
      coded[i] = window & low_ones(kLosslessBits);
      own += coded[i] >> 8 == kLosslessEscape ? 1 : 0;
    }
  }
  int escapes;
  constexpr int kPayloadBytes = kRowValues * kLosslessBits / 8;
  uint32_t next = (begin + 1) * 2 + kPayloadBytes + static_cast<uint32_t>(sum_below(own, escapes));
  uint32_t values[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const uint32_t below = coded[i] >> 8;
    values[i] = lossless_value(coded[i], below == kLosslessEscape ? block.byte(next++) : base - below);
  }
  return join_halves(values);
}

}  // namespace vericache::cuda
