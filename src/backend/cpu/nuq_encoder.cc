#include "backend/cpu/nuq_encoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vericache {
NuqEncoder::NuqEncoder(const bf16* source, const PartLayout& layout, int held, std::byte* groups)
    : source_(source),
      layout_(layout),
      held_(held),
      groups_(static_cast<size_t>(groups_of(layout))),
      apart_(static_cast<size_t>(dims_of(layout)) * kPageTokens),
      codes_(apart_.size()) {
  std::byte* levels = groups + 4 * groups_of(layout);
  fit_means();
  choose_outliers(levels + kNuqLevels);
  fit_ranges(groups);
  fit_levels(levels);
  encode(levels);
}

template <typename Take>
void NuqEncoder::for_group(int group, const Take& take) const {
  if (layout_.keys) {
    for (int token = 0; token < held_; ++token) {
      take(group, token);
    }
  } else {
    for (int dim = 0; group < held_ && dim < dims_of(layout_); ++dim) {
      take(dim, group);
    }
  }
}
template <typename Take>
void NuqEncoder::for_all(const Take& take) const {
  for (int dim = 0; dim < dims_of(layout_); ++dim) {
    for (int token = 0; token < held_; ++token) {
      take(dim, token);
    }
  }
}

// Of the finite values, summed in their order: the same bits on every backend.
void NuqEncoder::fit_means() {
  for (int i = 0; i < groups_of(layout_); ++i) {
    float sum = 0;
    int count = 0;
    for_group(i, [&](int dim, int token) {
      if (is_finite(value(dim, token))) {
        sum += float_of_bits(value(dim, token) << 16);
        ++count;
      }
    });
    groups_[static_cast<size_t>(i)].mean = count > 0 ? sum / static_cast<float>(count) : 0.0f;
  }
}

void NuqEncoder::choose_outliers(std::byte* slots) {
  const int room = outlier_slots(layout_.part, dims_of(layout_));
  const int wanted = std::min(room, dims_of(layout_) * held_);
  uint32_t counts[2][kRankDigit] = {};
  const auto rank = [&](int dim, int token) { return outlier_rank(value(dim, token), group(dim, token).mean); };
  for_all([&](int dim, int token) { ++counts[0][rank(dim, token) >> 7]; });
  const RankDigit high = find_digit(counts[0], 256, static_cast<uint32_t>(wanted));
  for_all([&](int dim, int token) {
    const uint32_t of_value = rank(dim, token);
    if (of_value >> 7 == high.digit) {
      ++counts[1][of_value & 127u];
    }
  });
  const RankDigit low = find_digit(counts[1], 128, high.wanted);
  const uint32_t least = high.digit << 7 | low.digit;
  uint32_t equal = 0;
  int used = 0;
  const auto put = [&](uint32_t slot) { std::memcpy(slots + 4 * static_cast<size_t>(used++), &slot, sizeof(slot)); };
  for_all([&](int dim, int token) {
    const uint32_t of_value = rank(dim, token);
    if (used < wanted && (of_value > least || (of_value == least && equal++ < low.wanted))) {
      put(outlier_place(dim, token) | value(dim, token) << 16);
      apart_[outlier_place(dim, token)] = true;
    }
  });
  while (used < room) {
    put(kFreeSlot);
  }
}

void NuqEncoder::fit_ranges(std::byte* groups) {
  for (int i = 0; i < groups_of(layout_); ++i) {
    float low = std::numeric_limits<float>::infinity();
    float high = -low;
    for_group(i, [&](int dim, int token) {
      if (counts(dim, token)) {
        low = std::min(low, float_of_bits(value(dim, token) << 16));
        high = std::max(high, float_of_bits(value(dim, token) << 16));
      }
    });
    bf16 stored[2] = {};  // scale, minimum; this is one of the values, so it needs no rounding
    if (low <= high) {
      stored[0] = round_up_to_bf16((high - low) / static_cast<float>(kNuqSteps));
      stored[1] = to_bf16(low);
    }
    std::memcpy(groups + 4 * static_cast<size_t>(i), stored, sizeof(stored));
    const float scale = to_float(stored[0]);
    groups_[static_cast<size_t>(i)].minimum = to_float(stored[1]);
    groups_[static_cast<size_t>(i)].inverse = scale > 0 ? 1.0f / scale : 0.0f;
  }
}

void NuqEncoder::fit_levels(std::byte* levels) {
  PlaceSums sums{};
  for_all([&](int dim, int token) {
    if (counts(dim, token)) {
      const Group& own = group(dim, token);
      ++sums.count[std::lrint(nuq_place(nuq_position(value(dim, token), own.minimum, own.inverse)))];
    }
  });
  uint32_t count = 0;
  uint32_t sum = 0;
  for (uint32_t i = 0; i <= kNuqPlaces; ++i) {
    const uint32_t here = sums.count[i];
    sums.count[i] = count;
    sums.sum[i] = sum;
    count += here;
    sum += here * i;
  }
  const int codes = 1 << layout_.part.bits;
  uint32_t level[kNuqLevels + 1] = {};
  for (int code = 0; code < codes; ++code) {
    level[code] = first_level(layout_.part.bits, code);
  }
  for (int step = 0; step < kLloydSteps; ++step) {
    uint32_t begin = 0;
    for (int code = 0; code < codes; ++code) {
      const uint32_t end = code + 1 < codes ? places_end(level[code], level[code + 1]) : uint32_t{kNuqPlaces};
      level[code] = middle_level(sums, begin, end, level[code]);
      begin = end;
    }
  }
  for (int code = 0; code < kNuqLevels; ++code) {
    levels[code] = static_cast<std::byte>(code < codes ? stored_level(level[code]) : 0);
  }
}

void NuqEncoder::encode(const std::byte* levels) {
  const int bits = layout_.part.bits;
  const auto* stored = reinterpret_cast<const uint8_t*>(levels);
  for_all([&](int dim, int token) {
    const Group& own = group(dim, token);
    codes_[outlier_place(dim, token)] = static_cast<uint8_t>(
        counts(dim, token) ? nuq_code(nuq_position(value(dim, token), own.minimum, own.inverse), stored, bits)
                           : nuq_middle_code(bits));
  });
}

bool NuqReader::find(int dim, int token, uint32_t& found) const {
  const uint32_t place = outlier_place(dim, token);
  int first = 0;
  for (int count = slots_; count > 0;) {
    const int half = count / 2;
    if (slot_place(slot(first + half)) < place) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  found = first < slots_ ? slot(first) : kFreeSlot;
  return slot_place(found) == place;
}

void NuqReader::patch(bf16* out) const {
  for (int i = 0; i < slots_; ++i) {
    const uint32_t at = slot_place(slot(i));
    if (at != kFreeSlot && is_finite(slot_value(slot(i)))) {
      out[index_of(layout_, static_cast<int>(at) / kPageTokens, static_cast<int>(at) % kPageTokens)] =
          bf16{static_cast<uint16_t>(slot_value(slot(i)))};
    }
  }
}

}  // namespace vericache
