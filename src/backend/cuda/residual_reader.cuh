// Rows of an encoded block that lies in shared memory (residual_code.h), read by a warp at a time.
// Device code; all lanes of a warp call together.
#pragma once

#include "backend/cuda/residual_row.cuh"

namespace vericache::cuda {

// A field in a word: its bits in the first byte; whether its sign is one of them in bit 15; the top from bit 16 on; in
// bit 31 the sign, where that is coded a one. What is below the top, times 2^16, or the bits as they are, sign and all,
// times 2^15, is taken from this word: then the high half is the value, but for a sign that is to be changed where bit
// 15 is still set. The low bits count modulo 32 wherever they shift or mask, whatever stands above them.
constexpr uint32_t kCodesSign = 0x80008000u;  // with the highest bit, which belongs to it
__device__ inline uint32_t pack_field(const ResidualField& field) {
  return static_cast<uint32_t>(field.bits()) | field.top << 16 |
         (field.either_sign ? kCodesSign
          : field.negative  ? 1u << 31
                            : 0);
}
// What a bit more in a field takes from its word.
__device__ inline uint32_t field_step(uint32_t field) {
  return select_or(field, 0x8000u, 0xffff0000u);  // -2^15 or -2^16
}
// All ones in each half whose highest bit is set.
__device__ inline uint32_t fill_halves(uint32_t word) {
  uint32_t filled;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(filled) : "r"(word));
  return filled;
}

// The interval that a code of a part that has such stands for: the ends of interval_field().
template <typename Format>
constexpr bool kIntervals = false;
template <int kBits, KvCode kCode>
constexpr bool kIntervals<FixedPart<kBits, kCode>> =
    kCode == KvCode::affine || kCode == KvCode::int8 || kCode == KvCode::nuq;
struct Interval {
  float low;
  float high;
};
__device__ inline Interval interval_of(const KvPart& part, uint32_t code, const ResidualGroup& group) {
  const float scale = float_of_bits(group.first << 16);
  const bool signed_code = part.code == KvCode::int8;
  const float minimum = signed_code ? -128.0f * scale : float_of_bits(group.second << 16);
  const auto step = static_cast<float>(signed_code ? static_cast<uint32_t>(int8_of(code) + 128) : code);
  const bool levels = part.code == KvCode::nuq;
  const float first = levels ? nuq_low(group.levels, code) : step - 0.5f;
  const float last = levels ? nuq_high(group.levels, code, part.bits) : step + 0.5f;
  // The products are exact: only the sums round.
  return {fmaf(first, scale, minimum), fmaf(last, scale, minimum)};
}
// How many bits the number in each half has, below 2048: as one of fp16 it is so many times 2^-24, and times 2^10 its
// exponent is that.
__device__ inline uint32_t bit_lengths(uint32_t numbers) {
  uint32_t scaled;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(scaled) : "r"(numbers), "r"(0x64006400u));
  return scaled >> 10 & 0x1f * kBothHalves;
}
// The words of two fields. tops: with the signs, of either sign a one; bits: with a one as the highest bit of those.
__device__ inline void join_fields(uint32_t tops, uint32_t bits, uint32_t& first, uint32_t& second) {
  first = __byte_perm(bits, tops, 0x5410);
  second = __byte_perm(bits, tops, 0x7632);
}
// interval_field() of two intervals, in the halves of words as far as they allow, without a branch.
__device__ inline void pack_intervals(const Interval& a, const Interval& b, uint32_t& first, uint32_t& second) {
  const uint32_t lows = residual_round(a.low, b.low);
  const uint32_t highs = residual_round(a.high, b.high);
  const uint32_t either = fill_halves(lows ^ highs);
  const uint32_t top = __vmaxu2(lows & kBothMagnitudes, highs & kBothMagnitudes);
  const uint32_t bottom = __vminu2(lows & kBothMagnitudes, highs & kBothMagnitudes) & ~either;
  const uint32_t bits = bit_lengths(__vminu2(top - bottom, ((1u << kOpenBits) - 1) * kBothHalves));
  join_fields(top + ((lows | highs) & kBothSigns), bits + (either & (kBothSigns | kBothHalves)), first, second);
}

// As many ones as the low five bits of `count` say.
__device__ inline uint32_t low_ones(uint32_t count) {
  uint32_t mask;
  asm("bmsk.wrap.b32 %0, 0, %1;" : "=r"(mask) : "r"(count));
  return mask;
}

// A row of a block, in halves of 2 bytes from its beginning.
struct RowSpan {
  uint32_t begin = 0;
  uint32_t halves = 0;
  __device__ bool raw() const { return halves == kRowHalves; }
};

// A block in shared memory. Whatever it holds, nothing outside its memory is read: a row that begins beyond it is taken
// to begin at its end, and kBehind bytes of whatever there is behind that may be read.
struct BlockReader {
  static constexpr size_t kBefore = 16;  // the half before the block tells where its first row begins
  static constexpr size_t kBehind = 1024;
  const std::byte* block;
  uint32_t most;  // halves

  __device__ static void begin(std::byte* block, int rows) {
    reinterpret_cast<uint16_t*>(block)[-1] = static_cast<uint16_t>(rows);
  }
  __device__ RowSpan row(int row) const {
    const auto* ends = reinterpret_cast<const uint16_t*>(block) + row;
    const uint32_t before = ends[-1];
    return {min(before, most), ends[0] - before};
  }
  // 64 bits from bit `at` on.
  __device__ void window(uint32_t at, uint32_t& low, uint32_t& high) const {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(block) + at / 32;
    const uint32_t middle = from[1];
    low = __funnelshift_r(from[0], middle, at);
    high = __funnelshift_r(middle, from[2], at);
  }
  __device__ uint32_t half(uint32_t index) const { return reinterpret_cast<const uint16_t*>(block)[index]; }
  __device__ uint32_t byte(uint32_t index) const { return static_cast<uint32_t>(block[index]); }
};
// Behind its beginning a row reads its fields, at most a lossless one's, and a value for each of its escapes at most.
static_assert(BlockReader::kBehind >= kRowValues * kLosslessBits / 8 + 2 * kRowValues + 64);

// The low halves of the values.
__device__ inline uint4 join_halves(const uint32_t (&values)[kLaneValues]) {
  return make_uint4(__byte_perm(values[0], values[1], 0x5410), __byte_perm(values[2], values[3], 0x5410),
                    __byte_perm(values[4], values[5], 0x5410), __byte_perm(values[6], values[7], 0x5410));
}
// Two values from the words that their fields leave.
__device__ inline uint32_t join_values(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632) ^ (__byte_perm(first, second, 0x5410) & 0x80008000u);
}
// Replaces the value at `index`, 0 .. 7; not below or above.
__device__ inline void put_value(uint4& vector, uint32_t index, uint32_t value) {
  const uint32_t order = (index & 1) != 0 ? 0x5410 : 0x3254;
  const uint32_t word = index / 2;
  vector.x = word == 0 ? __byte_perm(vector.x, value, order) : vector.x;
  vector.y = word == 1 ? __byte_perm(vector.y, value, order) : vector.y;
  vector.z = word == 2 ? __byte_perm(vector.z, value, order) : vector.z;
  vector.w = word == 3 ? __byte_perm(vector.w, value, order) : vector.w;
}

__device__ inline uint4 read_raw(const BlockReader& block, uint32_t begin, int lane) {
  uint32_t values[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    values[i] = block.half(begin + static_cast<uint32_t>(lane * kLaneValues + i));
  }
  return join_halves(values);
}

// What escapes: of intervals all ones of kOpenBits bits, of likely ranges a zero. A key of a value tells by what its
// field's bits take from the word, a negative number, and by its index, the key's low bits: of a lane the smallest one
// is its first escape, if it has any, the next its second.
struct OpenEscapes {
  static constexpr int kFieldBits = kOpenBits + 1;  // at most
  static constexpr int32_t kMost = -(((1 << (kOpenBits + 1)) - 2) << 15);
  __device__ static int32_t key(uint32_t taken, int index) { return static_cast<int32_t>(taken) + index; }
  __device__ static bool escapes(int32_t key) { return key < kMost + kLaneValues; }
  // The smallest key, as it is found: fewer instructions where what is taken is added.
  static constexpr int32_t kNone = INT32_MAX;
  __device__ static int32_t nearer(int32_t found, uint32_t taken, int index) { return min(found, key(taken, index)); }
  __device__ static int32_t key_of(int32_t found) { return found; }
};
struct LikelyEscapes {
  static constexpr int kFieldBits = kLikelyBits;
  __device__ static int32_t key(uint32_t taken, int index) { return index - static_cast<int32_t>(taken); }
  __device__ static bool escapes(int32_t key) { return key < kLaneValues; }
  static constexpr int32_t kNone = INT32_MIN;
  __device__ static int32_t nearer(int32_t found, uint32_t taken, int index) {
    return max(found, static_cast<int32_t>(taken) + (kLaneValues - 1 - index));
  }
  __device__ static int32_t key_of(int32_t found) { return kLaneValues - 1 - found; }
};

// Puts what escaped in a row in its places: `escapes` values at most, from the half `next` on. key: of a lane's first
// one, if it has any; key_at(i): that of its value i.
template <typename Escapes, typename KeyAt>
__device__ __forceinline__ void put_escapes(const BlockReader& block, uint32_t next, uint32_t escapes, int32_t key,
                                            const KeyAt& key_at, uint4& out) {
  const uint32_t last = next + escapes;
  bool escaped = Escapes::escapes(key);
  uint32_t lanes = __ballot_sync(kAllLanes, escaped);
  const auto put_one_of_each = [&] {
    if (escaped) {
      put_value(out, static_cast<uint32_t>(key) % kLaneValues,
                block.half(next + static_cast<uint32_t>(__popc(lanes & lanes_below()))));
    }
    next += static_cast<uint32_t>(__popc(lanes));
  };
  put_one_of_each();
  // Seldom more than one of a lane: what the search for it needs is made in here.
#pragma unroll 1
  while (next < last && lanes != 0) {
    // The smallest key beyond this one: smaller ones are huge where they are counted from it.
    uint32_t beyond = UINT32_MAX;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      beyond = min(beyond, static_cast<uint32_t>(key_at(i) - key - 1));
    }
    key += static_cast<int32_t>(beyond) + 1;
    escaped = escaped && Escapes::escapes(key);
    lanes = __ballot_sync(kAllLanes, escaped);
    put_one_of_each();
  }
}

// kRows coded rows at once, one sum over the lanes for two of them. Of a raw row it gives something.
template <typename Escapes, int kRows>
__device__ __forceinline__ void read_coded(const BlockReader& block, const RowSpan (&rows)[kRows],
                                           const uint32_t (&fields)[kRows][kLaneValues], uint4 (&out)[kRows]) {
  constexpr int kBits = Escapes::kFieldBits;
  static_assert(kLaneValues == 8 && 4 * kBits <= 64 && 2 * kBits < 32 && kLaneValues * kBits < 256);
  static_assert(kRows <= 2 && 32 * kLaneValues * kBits < 1 << 16);
  uint32_t first_bits[kRows];
  uint32_t own_bits = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t(&f)[kLaneValues] = fields[r];
    first_bits[r] = (f[0] + f[1] + f[2] + f[3]) & 0xffu;
    own_bits += ((f[0] + f[1] + f[2] + f[3] + f[4] + f[5] + f[6] + f[7]) & 0xffu) << (16 * r);
  }
  int total;
  const auto bits_before = static_cast<uint32_t>(sum_below(static_cast<int>(own_bits), total));
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t(&f)[kLaneValues] = fields[r];
    const uint32_t first = rows[r].begin * 16 + (bits_before >> (16 * r) & 0xffffu);
    uint32_t taken[kLaneValues];
    int32_t nearest = Escapes::kNone;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t low;
      uint32_t high;
      block.window(first + (half == 0 ? 0 : first_bits[r]), low, high);
      uint32_t at = 0;
#pragma unroll
      for (int i = 4 * half; i < 4 * half + 4; ++i) {
        // Of four fields the last begins behind the first word where all before it are wide.
        const bool behind = 3 * kBits >= 32 && i % 4 == 3 && (at & 32) != 0;
        taken[i] = (__funnelshift_r(behind ? high : low, high, at) & low_ones(f[i])) * field_step(f[i]);
        nearest = Escapes::nearer(nearest, taken[i], i);
        at += f[i];
      }
    }
    const auto pair = [&](int i) { return join_values(f[i] + taken[i], f[i + 1] + taken[i + 1]); };
    out[r] = make_uint4(pair(0), pair(2), pair(4), pair(6));
    const uint32_t coded_halves = ((static_cast<uint32_t>(total) >> (16 * r) & 0xffffu) + 15) / 16;
    const uint32_t escapes = rows[r].halves - coded_halves;
    if (escapes - 1 < kRowValues) {
      put_escapes<Escapes>(
          block, rows[r].begin + coded_halves, escapes, Escapes::key_of(nearest),
          [&](int i) { return Escapes::key(taken[i], i); }, out[r]);
    }
  }
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

// A row that is coded by itself, or stayed as it was.
__device__ inline uint4 read_alone(const BlockReader& block, const RowSpan& row, int lane) {
  return row.raw() ? read_raw(block, row.begin, lane) : read_lossless(block, row.begin, lane);
}

}  // namespace vericache::cuda
