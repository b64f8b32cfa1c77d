// NuqEncoder makes the codes of a K or V part, NuqReader says where what they are read with lies in it (nuq_codes.h).
// Any thread.
#pragma once

#include <cstring>
#include <vector>

#include "backend/cpu/simd.h"
#include "backend/nuq_codes.h"

namespace vericache {

inline int dims_of(const PartLayout& layout) {
  return layout.keys ? 2 * layout.pairs : kPanel * layout.panels;
}
inline int groups_of(const PartLayout& layout) {
  return 2 * layout.pairs;
}
// Of a value in the bf16 part.
inline size_t index_of(const PartLayout& layout, int dim, int token) {
  const int across = layout.keys ? token : dim;
  const int along = layout.keys ? dim : token;
  const int row = across / kPanel * layout.pairs + along / 2;
  const int index = (row * kPanel + across % kPanel) * 2 + along % 2;
  return static_cast<size_t>(index);
}

class NuqEncoder {
 public:
  // held: tokens of the page; the others count as absent. groups: where the part's group bytes begin; written.
  NuqEncoder(const bf16* source, const PartLayout& layout, int held, std::byte* groups);
  uint32_t code(int dim, int token) const { return codes_[outlier_place(dim, token)]; }

 private:
  struct Group {
    float mean = 0;
    float minimum = 0;
    float inverse = 0;  // of the scale
  };

  uint32_t value(int dim, int token) const { return source_[index_of(layout_, dim, token)].bits; }
  Group& group(int dim, int token) { return groups_[static_cast<size_t>(layout_.keys ? dim : token)]; }
  // take(dim, token) for every held value of a group, or of the part, by rising dim and then token.
  template <typename Take>
  void for_group(int group, const Take& take) const;
  template <typename Take>
  void for_all(const Take& take) const;
  // Whether a value counts for ranges and levels.
  bool counts(int dim, int token) const { return !apart_[outlier_place(dim, token)] && is_finite(value(dim, token)); }

  void fit_means();
  void choose_outliers(std::byte* slots);
  void fit_ranges(std::byte* groups);
  void fit_levels(std::byte* levels);
  void encode(const std::byte* levels);

  const bf16* source_;
  PartLayout layout_;
  int held_;
  std::vector<Group> groups_;
  std::vector<bool> apart_;     // by place: outliers
  std::vector<uint8_t> codes_;  // by place
};

// Of a packed part.
class NuqReader {
 public:
  NuqReader(const std::byte* part, const PartLayout& layout)
      : groups_(part + layout.code_bytes()), layout_(layout), slots_(outlier_slots(layout.part, dims_of(layout))) {}

  float scale(int group) const { return read(group, 0); }
  float minimum(int group) const { return read(group, 1); }
  const uint8_t* levels() const { return reinterpret_cast<const uint8_t*>(groups_) + 4 * groups_of(layout_); }
  size_t group_bytes() const {
    return static_cast<size_t>(vericache::group_bytes(layout_.part, dims_of(layout_), groups_of(layout_)));
  }
  // The slot of the outlier that stands there, if one does.
  bool find(int dim, int token, uint32_t& found) const;
  // Writes the outliers that a draft may read over the values of a bf16 part.
  void patch(bf16* out) const;

 private:
  float read(int group, int which) const {
    bf16 stored;
    std::memcpy(&stored, groups_ + 4 * group + 2 * which, sizeof(stored));
    return to_float(stored);
  }
  uint32_t slot(int i) const {
    uint32_t read;
    std::memcpy(&read, levels() + kNuqLevels + 4 * i, sizeof(read));
    return read;
  }

  const std::byte* groups_;
  PartLayout layout_;
  int slots_;
};

}  // namespace vericache
