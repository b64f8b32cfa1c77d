// Codes of a packed part of a head page of the CPU, one by one: what a decoder of residuals starts from.
// Pure; any thread.
#pragma once

#include "backend/cpu/simd.h"

namespace vericache {

// Where value `index` of a part stands, `index` counted in the order of the bf16 part (kv_view.h).
struct CodeIndex {
  int row = 0;
  int lane = 0;
  int e = 0;      // of the pair
  int token = 0;  // of the page
  int dim = 0;    // of the head
  int group = 0;  // whose scale and minimum, or base or scale, the code is read with
};
inline CodeIndex code_index(const PartLayout& layout, int index) {
  CodeIndex at{.row = index / (2 * kPanel), .lane = index / 2 % kPanel, .e = index % 2};
  const int in_panel = 2 * (at.row % layout.pairs) + at.e;
  at.token = layout.keys ? at.row / layout.pairs * kPanel + at.lane : in_panel;
  at.dim = layout.keys ? in_panel : at.row / layout.pairs * kPanel + at.lane;
  at.group = layout.part.by_token() ? at.token : in_panel;
  return at;
}

// The code of that value, from the packed part.
inline uint32_t code_at(const std::byte* part, const PartLayout& layout, const CodeIndex& at) {
  uint32_t code = 0;
  for (int width = 8; width > 0; width /= 2) {
    if ((layout.part.bits & width) == 0) {
      continue;
    }
    const std::byte* row = part + plane_offset(layout, width) + row_offset(width, at.row);
    const uint32_t read = width == 8
                              ? std::to_integer<uint32_t>(row[2 * at.lane + at.e])
                              : std::to_integer<uint32_t>(row[at.lane]) >> (row_shift(width, at.row) + width * at.e);
    code = code << width | (read & ((1u << width) - 1));
  }
  return code;
}

// What the codes of a group are read with: behind all codes.
inline uint32_t base_of(const std::byte* part, const PartLayout& layout, int group) {
  return std::to_integer<uint32_t>(part[layout.code_bytes() + static_cast<size_t>(group)]);
}

}  // namespace vericache
