// Non-uniform codes (KVQuant, Hooper et al. 2024): the levels of a part, which values are its outliers, and what a code
// says; kv_view.h says where all of it lies. Host and device code; pure; any thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "backend/kv_codes.h"

namespace vericache {

// As in the paper keys share a range per channel and values per token (section 3.1), codes name levels that lie where
// the values do (3.3), and the values farthest out are kept apart as they are and count neither for ranges nor for
// levels (3.4). Not as in the paper: keys are coded behind the rotary embedding (3.2 puts it after reading, where
// drafts would pay for it at every step); outliers are a fixed share of a page, so that pages keep their size; and the
// levels come from no calibration set with sensitivities but from the page itself: some steps of Lloyd's algorithm over
// a histogram of its values, each counted from its group's minimum in 127ths of the group's range.

// Positions in a group's range: value = minimum + position * scale. Levels are positions, rising, one a byte: with an
// exponent of 128 beside it a position is a bf16.
inline constexpr int kNuqPositions = 128;
inline constexpr int kNuqSteps = kNuqPositions - 1;

// The code of outliers, and of what is not finite and found no slot.
VERICACHE_BOTH constexpr uint32_t nuq_middle_code(int bits) {
  return 1u << (bits - 1);
}

// A slot: where an outlier stands - its dim and its token - and above it the value. Used slots come first, by rising
// place.
inline constexpr uint32_t kFreeSlot = 0xffffu;
VERICACHE_BOTH constexpr uint32_t outlier_place(int dim, int token) {
  return static_cast<uint32_t>(dim * kPageTokens + token);
}
VERICACHE_BOTH constexpr uint32_t slot_place(uint32_t slot) {
  return slot & 0xffffu;
}
VERICACHE_BOTH constexpr uint32_t slot_value(uint32_t slot) {
  return slot >> 16;
}
VERICACHE_BOTH constexpr bool is_finite(uint32_t value) {
  return (value & kMagnitudeBits) >> 7 != kSpecialExponent;
}

// How far out a value lies: its distance from the mean of its group's finite values as 15 bits that grow with it. Of
// equal ones those of lower place go first. Values that are not finite lie farthest.
inline constexpr int kRankBits = 15;
VERICACHE_BOTH inline uint32_t outlier_rank(uint32_t value, float mean) {
  if (!is_finite(value)) {
    return (1u << kRankBits) - 1;
  }
  const float distance = float_of_bits(value << 16) - mean;
  uint32_t bits;
  memcpy(&bits, &distance, sizeof(bits));
  return bits >> 16 & kMagnitudeBits;
}
// The rank is looked for digit by digit: the high 8 bits, then the low 7.
inline constexpr int kRankDigit = 256;
// The digit at which `wanted` of the values that a histogram counts are reached from above, and how many of that digit
// are still wanted then; less than that many values: digit 0.
struct RankDigit {
  uint32_t digit = 0;
  uint32_t wanted = 0;
};
VERICACHE_BOTH inline RankDigit find_digit(const uint32_t* counts, int digits, uint32_t wanted) {
  RankDigit found{static_cast<uint32_t>(digits) - 1, wanted};
  while (found.digit > 0 && counts[found.digit] < found.wanted) {
    found.wanted -= counts[found.digit--];
  }
  return found;
}

// Where a value stands in its group's range; inverse: of the scale.
VERICACHE_BOTH inline float nuq_position(uint32_t value, float minimum, float inverse) {
  return (float_of_bits(value << 16) - minimum) * inverse;
}

// Levels are looked for among finer places of the range: kNuqFiner to a position.
inline constexpr int kNuqFiner = 4;
inline constexpr int kNuqPlaces = kNuqFiner * kNuqSteps + 1;
// The place of a position, to be rounded to the nearest.
VERICACHE_BOTH inline float nuq_place(float position) {
  return fminf(fmaxf(position * static_cast<float>(kNuqFiner), 0.0f), static_cast<float>(kNuqPlaces - 1));
}

// Of the values at the places below each: how many, fewer than 2^16 in all, and the sum of their places.
struct PlaceSums {
  uint32_t count[kNuqPlaces + 1];
  uint32_t sum[kNuqPlaces + 1];
};

// Lloyd's algorithm. A level is in 256ths of a position until it is stored. Where the search begins: the best levels
// for normal values, 64 in a group, counted from their smallest.
inline constexpr int kLloydSteps = 16;
inline constexpr uint32_t kOfPlace = 256 / kNuqFiner;
VERICACHE_BOTH inline uint32_t first_level(int bits, int code) {
  constexpr uint16_t kLower[3][8] = {
      {5380, 13000}, {1990, 7170, 11120, 14590}, {725, 4215, 6920, 9130, 11000, 12640, 14140, 15545}};
  const int half = 1 << (bits - 1);
  return code < half ? kLower[bits - 2][code]
                     : static_cast<uint32_t>(256 * kNuqSteps) - kLower[bits - 2][2 * half - 1 - code];
}
// The first place that lies nearer to the next level.
VERICACHE_BOTH constexpr uint32_t places_end(uint32_t level, uint32_t next) {
  return (level + next) / (2 * kOfPlace) + 1;
}
// The middle of the values at the places [begin, end); of none the level that was.
VERICACHE_BOTH inline uint32_t middle_level(const PlaceSums& sums, uint32_t begin, uint32_t end, uint32_t level) {
  const uint32_t count = sums.count[end] - sums.count[begin];
  return count > 0 ? ((sums.sum[end] - sums.sum[begin]) * kOfPlace + count / 2) / count : level;
}
VERICACHE_BOTH constexpr uint8_t stored_level(uint32_t level) {
  return static_cast<uint8_t>((level + 128) / 256);
}

// The positions that a code stands for: from halfway to the level below it to halfway to the one above, and half a
// position beyond the ends.
template <typename Levels>
VERICACHE_BOTH inline float nuq_low(const Levels& levels, uint32_t code) {
  const int two = code == 0 ? -1 : static_cast<int>(levels[code - 1]) + static_cast<int>(levels[code]);
  return 0.5f * static_cast<float>(two);
}
template <typename Levels>
VERICACHE_BOTH inline float nuq_high(const Levels& levels, uint32_t code, int bits) {
  return code + 1 == 1u << bits ? static_cast<float>(kNuqSteps) + 0.5f : nuq_low(levels, code + 1);
}
template <typename Levels>
VERICACHE_BOTH inline uint32_t nuq_code(float position, const Levels& levels, int bits) {
  uint32_t code = 0;  // half of what is left, each time
  for (uint32_t half = nuq_middle_code(bits); half > 0; half /= 2) {
    code += position > nuq_low(levels, code + half) ? half : 0;
  }
  return code;
}

}  // namespace vericache
