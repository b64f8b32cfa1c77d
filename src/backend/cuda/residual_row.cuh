// A row of an encoded page (residual_code.h) in the lanes of a warp, 8 values each: what resident codes leave open, and
// how it is written.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/chunk_layout.h"
#include "backend/cuda/warp_ops.cuh"
#include "backend/residual_code.h"

namespace vericache::cuda {

constexpr int kRowHalves = kRowValues;

// The sum of what the lanes below this one hold; `total` that of all.
__device__ inline int sum_below(int value, int& total) {
  int sum = value;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    // The predicate says whether there is a lane so far below.
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        ".reg .s32 other;\n"
        "shfl.sync.up.b32 other|there, %0, %1, 0, 0xffffffff;\n"
        "@there add.s32 %0, %0, other;\n"
        "}\n"
        : "+r"(sum)
        : "r"(apart));
  }
  total = __shfl_sync(kAllLanes, sum, 31);
  return sum - value;
}

__device__ inline void unpack_values(const uint4& packed, uint32_t (&values)[kLaneValues]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    values[i] = words[i / 2] >> (16 * (i % 2)) & 0xffffu;
  }
}

// A part whose bits and code the compiler knows.
template <int kBits, KvCode kCode = KvCode::affine>
struct FixedPart {
  VERICACHE_BOTH constexpr operator KvPart() const { return KvPart(kBits, kCode); }
};
template <int kBits>
struct FixedPart<kBits, KvCode::nuq> {
  int outliers = 0;
  VERICACHE_BOTH constexpr operator KvPart() const { return KvPart(kBits, KvCode::nuq, outliers); }
};
template <typename Format>
constexpr bool kTabulated = false;  // few enough codes that the fields of all of them are made first
template <int kBits>
constexpr bool kTabulated<FixedPart<kBits, KvCode::affine>> = kBits <= 4;
template <typename Format>
constexpr bool kPlane = false;
template <int kBits>
constexpr bool kPlane<FixedPart<kBits, KvCode::plane>> = true;
template <int kBits>
constexpr bool kTabulated<FixedPart<kBits, KvCode::nuq>> = true;

// Where a lane's 8 values of a row of K or V lie: of K 8 dims of one token, from the first on, of V 8 tokens of one dim
// (layout.h).
struct LanePlace {
  int row = 0;  // of the part
  int token = 0;
  int dim = 0;
};
template <int kHeadDim, bool kKeys>
__device__ inline LanePlace lane_place(int row, int lane) {
  return kKeys ? LanePlace{row, row % 8 * 8 + lane / 4, row / 8 * 32 + 8 * (lane % 4)}
               : LanePlace{row, row / (kHeadDim / 8) * 32 + 8 * (lane % 4), row % (kHeadDim / 8) * 8 + lane / 4};
}

// The K (kKeys) or V part of a packed head page, and the codes of a lane's values in it. Format: FixedPart.
template <int kHeadDim, bool kKeys, typename Format>
struct PackedPart {
  static constexpr int kAffineGroups = kKeys ? kHeadDim : kPageTokens;
  Format format;

  __device__ static int first_affine_group(const LanePlace& at) { return kKeys ? at.dim : at.token; }
  __device__ void read_codes(const std::byte* part, const LanePlace& at, uint32_t (&codes)[kLaneValues]) const {
    const KvPart own = format;
    if (!chunked(own)) {
      read_words(part + group_bytes(own, kHeadDim, kAffineGroups), own.bits, at, codes);
    } else if constexpr (kKeys) {
      key_codes(part, own, kHeadDim, at.token, at.dim, codes);
    } else {
      value_codes(part, own, kHeadDim, at.token, at.dim, codes);
    }
  }
  __device__ ResidualGroup affine_group(const std::byte* part, int group) const {
    const AffineBits affine = affine_of(part, group, kAffineGroups);
    return {affine.scale, affine.minimum, levels_of(part, kAffineGroups)};
  }
  // take(i, code, group) for the lane's values.
  template <typename Take>
  __device__ void with_codes(const std::byte* part, const LanePlace& at, const Take& take) const {
    const KvPart own = format;
    uint32_t codes[kLaneValues];
    read_codes(part, at, codes);
    uint32_t first[kLaneValues];
    uint32_t second[kLaneValues] = {};
    if (!own.by_token()) {
      const auto* affine = reinterpret_cast<const uint16_t*>(part) + first_affine_group(at);
      unpack_values(*reinterpret_cast<const uint4*>(affine), first);
      unpack_values(*reinterpret_cast<const uint4*>(affine + kAffineGroups), second);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        const int token = at.token + (kKeys ? 0 : i);
        first[i] = own.code == KvCode::int8 ? reinterpret_cast<const uint16_t*>(part)[token] : base_of(part, token);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      take(i, codes[i], ResidualGroup{first[i], second[i], levels_of(part, kAffineGroups)});
    }
  }
  __device__ void read_fields(const std::byte* part, const LanePlace& at, ResidualField (&fields)[kLaneValues]) const {
    with_codes(part, at, [&](int i, uint32_t code, const ResidualGroup& group) {
      fields[i] = residual_field(format, code, group);
    });
  }

 private:
  // Of packed_layout.h: the 8 codes lie in one word of a plane.
  __device__ static void read_words(const std::byte* planes, int bits, const LanePlace& at,
                                    uint32_t (&codes)[kLaneValues]) {
    const int width = bits == 2 ? 2 : 4;
    const CodePlace place = kKeys ? key_place(at.token, at.dim, width) : value_place(at.token, at.dim, width);
    const auto* words = reinterpret_cast<const uint32_t*>(planes) + place.word;
    const uint32_t high = words[0] >> (bits == 2 ? place.shift : 0);
    const uint32_t low = bits == 8 ? words[plane_bytes(4, kHeadDim) / 4] : 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int shift = pair_shift(i, width, 0);
      codes[i] = high >> shift & ((1u << width) - 1);
      if (bits == 8) {
        codes[i] = codes[i] << 4 | (low >> shift & 15u);
      }
    }
  }
};

// run(PackedPart) of the format that a part has, which is nuq or not; not for one that is exact.
// Inlined by force: what run refers to would lie in local memory, and its shared memory be read as if it were any.
template <int kHeadDim, bool kKeys, bool kNuq, typename Run>
__device__ __forceinline__ void with_part(const KvPart& part, const Run& run) {
  const auto as = [&](auto format) { run(PackedPart<kHeadDim, kKeys, decltype(format)>{format}); };
  if constexpr (kNuq) {
    part.bits == 2   ? as(FixedPart<2, KvCode::nuq>{part.outliers})
    : part.bits == 3 ? as(FixedPart<3, KvCode::nuq>{part.outliers})
                     : as(FixedPart<4, KvCode::nuq>{part.outliers});
    return;
  }
  if (part.code == KvCode::int8) {
    as(FixedPart<8, KvCode::int8>());
  } else if (part.code == KvCode::fp8) {
    as(FixedPart<8, KvCode::fp8>());
  } else if (part.code == KvCode::plane) {
    part.bits == 6   ? as(FixedPart<6, KvCode::plane>())
    : part.bits == 7 ? as(FixedPart<7, KvCode::plane>())
    : part.bits == 8 ? as(FixedPart<8, KvCode::plane>())
                     : as(FixedPart<9, KvCode::plane>());
  } else if (part.bits == 2) {
    as(FixedPart<2>());
  } else if (part.bits == 3) {
    as(FixedPart<3>());
  } else if (part.bits == 4) {
    as(FixedPart<4>());
  } else if (part.bits == 6) {
    as(FixedPart<6>());
  } else {
    as(FixedPart<8>());
  }
}

// A row as a lane is about to write it.
struct LaneRow {
  uint32_t bits[kLaneValues];
  int widths[kLaneValues];
  uint32_t escaped = 0;  // values, one bit each
  int own_bits = 0;
  int first_bit = 0;     // of this lane
  int total_bits = 0;    // of the warp, without a base
  int first_escape = 0;  // of this lane
  int escapes = 0;       // of the warp
  bool raw = false;
  int halves = 0;  // of the row
};

__device__ inline void measure(LaneRow& row, bool fits, bool lossless) {
  row.own_bits = 0;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    row.own_bits += row.widths[i];
  }
  row.first_bit = sum_below(row.own_bits, row.total_bits);
  row.first_escape = sum_below(__popc(row.escaped), row.escapes);
  const int escape_halves = lossless ? (row.escapes + 1) / 2 : row.escapes;
  row.halves = (lossless ? 1 : 0) + (row.total_bits + 15) / 16 + escape_halves;
  row.raw = row.halves >= kRowHalves || __any_sync(kAllLanes, !fits);
  row.halves = row.raw ? kRowHalves : row.halves;
}

__device__ inline void code_row(const uint32_t (&values)[kLaneValues], const ResidualField (&fields)[kLaneValues],
                                LaneRow& row) {
  bool fits = true;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const CodedValue coded = code_value(fields[i], values[i]);
    fits = fits && coded.fits;
    row.bits[i] = coded.bits;
    row.widths[i] = fields[i].bits();
    row.escaped |= coded.escapes ? 1u << i : 0;
  }
  measure(row, fits, false);
}

// As lossless_base() of residual_rows.h.
__device__ inline uint32_t choose_base(const uint32_t (&values)[kLaneValues]) {
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    own = max(own, exponent_of(values[i]));
  }
  const uint32_t most = __reduce_max_sync(kAllLanes, own);
  uint32_t best = most;
  unsigned best_held = 0;
  for (uint32_t lower = 0; lower < kLosslessBases && lower <= most; ++lower) {
    const uint32_t base = most - lower;
    unsigned held = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      held += base - exponent_of(values[i]) < kLosslessEscape ? 1 : 0;
    }
    held = __reduce_add_sync(kAllLanes, held);
    if (held > best_held) {
      best_held = held;
      best = base;
    }
  }
  return best;
}

__device__ inline void code_lossless_row(const uint32_t (&values)[kLaneValues], uint32_t base, LaneRow& row) {
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const CodedValue coded = code_lossless(base, values[i]);
    row.bits[i] = coded.bits;
    row.widths[i] = kLosslessBits;
    row.escaped |= coded.escapes ? 1u << i : 0;
  }
  measure(row, true, true);
}

// Into zeroed shared words, the row beginning at the first.
__device__ inline void put_bits(uint32_t* words, int at, uint32_t bits, int count) {
  const int shift = at % 32;
  if (count > 0) {
    atomicOr(words + at / 32, bits << shift);
    if (shift + count > 32) {
      atomicOr(words + at / 32 + 1, bits >> (32 - shift));
    }
  }
}
__device__ inline void put_row(const LaneRow& row, const uint32_t (&values)[kLaneValues], bool lossless, uint32_t base,
                               int lane, uint32_t* words) {
  if (row.raw) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      put_bits(words, (lane * kLaneValues + i) * 16, values[i], 16);
    }
    return;
  }
  if (lossless && lane == 0) {
    put_bits(words, 0, base, 16);
  }
  int at = row.first_bit + (lossless ? 16 : 0);
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    put_bits(words, at, row.bits[i], row.widths[i]);
    at += row.widths[i];
  }
  int next = (lossless ? 16 : 0) + (row.total_bits + 15) / 16 * 16;
  if (lossless) {
    next += row.first_escape * 8;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      if (row.escaped >> i & 1) {
        put_bits(words, next, exponent_of(values[i]), 8);
        next += 8;
      }
    }
    return;
  }
  for (uint32_t left = row.escaped; __any_sync(kAllLanes, left != 0); left &= left - 1) {
    const uint32_t lanes = __ballot_sync(kAllLanes, left != 0);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      if (__ffs(static_cast<int>(left)) == i + 1) {
        put_bits(words, next + 16 * __popc(lanes & lanes_below()), values[i], 16);
      }
    }
    next += 16 * __popc(lanes);
  }
}

}  // namespace vericache::cuda
