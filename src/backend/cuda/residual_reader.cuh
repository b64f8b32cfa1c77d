// Rows of an encoded block that lies in shared memory (residual_code.h), read by a warp at a time.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/residual_row.cuh"

namespace vericache::cuda {

// A field in a word, for tables: its bits in the first byte, in the second whether the sign is one of them, top and
// sign in the high half. The low bits count modulo 32 wherever they shift or mask, whatever stands above them.
__device__ inline uint32_t pack_field(const ResidualField& field) {
  return static_cast<uint32_t>(field.bits()) | (field.either_sign ? 1u << 8 : 0) | field.top << 16 |
         (field.negative ? 1u << 31 : 0);
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
  const uint32_t packed = select_or(pair, 0x80000000u, top << 16) + bits + either * 0x101u;
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

// As many ones as the low five bits of `count` say.
__device__ inline uint32_t low_ones(uint32_t count) {
  uint32_t mask;
  asm("bmsk.wrap.b32 %0, 0, %1;" : "=r"(mask) : "r"(count));
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
// The high halves of two values, the sign of each changed where the highest bit of its `turned` is set.
__device__ inline uint32_t join_signed(const uint32_t* values, const uint32_t* turned) {
  return __byte_perm(values[0], values[1], 0x7632) ^ (__byte_perm(turned[0], turned[1], 0x7733) & 0x80008000u);
}

__device__ inline uint4 read_raw(const BlockReader& block, uint32_t begin, int lane) {
  uint32_t values[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    values[i] = block.half(begin + static_cast<uint32_t>(lane * kLaneValues + i));
  }
  return join_halves(values);
}

// fields: packed. The row has `halves`.
__device__ inline uint4 read_coded(const BlockReader& block, uint32_t begin, uint32_t halves,
                                   const uint32_t (&fields)[kLaneValues]) {
  static_assert(kLaneValues == 8 && 4 * kMostFieldBits <= 64 && 3 * kMostFieldBits < 32);
  constexpr uint32_t kEscape = (1u << kOpenBits) - 1;
  const uint32_t first_bits = (fields[0] + fields[1] + fields[2] + fields[3]) & 0xffu;
  const uint32_t own_bits = (first_bits + fields[4] + fields[5] + fields[6] + fields[7]) & 0xffu;
  int total;
  const uint32_t first = begin * 16 + static_cast<uint32_t>(sum_below(static_cast<int>(own_bits), total));
  uint32_t values[kLaneValues];  // in the high halves
  uint32_t below[kLaneValues];   // below the top; the sign, where it is coded, in the highest bit
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t low;
    uint32_t high;
    block.window(first + (half == 0 ? 0 : first_bits), low, high);
    uint32_t at = 0;
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      const uint32_t coded = __funnelshift_r(low, high, at) & low_ones(fields[i]);
      below[i] = __funnelshift_r(coded, coded, fields[i] >> 8);
      values[i] = fields[i] - below[i] * 0x10000u;
      at += fields[i];
    }
  }
  const uint32_t coded_halves = (static_cast<uint32_t>(total) + 15) / 16;
  if (halves > coded_halves) {
    uint32_t escaped = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      escaped |= (below[i] & 0x7fffffffu) == kEscape ? 1u << i : 0;
    }
    uint32_t next = begin + coded_halves;
    if (__any_sync(kAllLanes, (escaped & (escaped - 1)) != 0)) {
      int escapes;
      next += static_cast<uint32_t>(sum_below(__popc(escaped), escapes));
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        if ((escaped >> i & 1) != 0) {
          values[i] = block.half(next++) << 16;
          below[i] = 0;
        }
      }
    } else {  // as a rule no lane has two
      next += static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, escaped != 0) & lanes_below()));
      const uint32_t value = block.half(next) << 16;
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        values[i] = (escaped >> i & 1) != 0 ? value : values[i];
        below[i] = (escaped >> i & 1) != 0 ? 0 : below[i];
      }
    }
  }
  return make_uint4(join_signed(values, below), join_signed(values + 2, below + 2), join_signed(values + 4, below + 4),
                    join_signed(values + 6, below + 6));
}

// A row of plane codes, of which none escapes: all fields have one width, and a code's own bits stand above them.
// bases: of the codes' tokens.
template <int kBits>
__device__ inline uint4 read_plane_fields(const BlockReader& block, uint32_t begin, int lane,
                                          const uint32_t (&codes)[kLaneValues], const uint32_t (&bases)[kLaneValues]) {
  constexpr int kWidth = 12 - kBits;
  constexpr uint32_t kOnes = (1u << kWidth) - 1;
  static_assert(kLaneValues * kWidth <= 64);
  uint32_t low;
  uint32_t high;
  block.window(begin * 16 + static_cast<uint32_t>(lane * kLaneValues * kWidth), low, high);
  uint32_t values[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int at = i * kWidth;
    const uint32_t coded = at < 32 ? __funnelshift_r(low, high, at) : high >> (at - 32);
    // The sign stands at bit 11 of the shifted code, the rank from bit 7 on: base - 15 + rank is the exponent.
    const uint32_t code = codes[i] << kWidth;
    values[i] = code + (code & 0x800u) * 15 + (bases[i] << 7) - (15u << 7) + (~coded & kOnes);
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
