#include "backend/cpu/residuals.h"

#include <array>
#include <vector>

#include "backend/cpu/codes.h"
#include "backend/cpu/nuq_encoder.h"
#include "backend/residual_rows.h"
#include "backend/rotated_residual.h"
#include "base/check.h"

namespace vericache {
namespace {

// The codes of the resident head pages of one page, and what they are read with.
class PackedFields {
 public:
  PackedFields(const KvView& resident, int page, const KvShape& shape, ResidualCode code)
      : resident_(resident),
        page_(page),
        shape_(shape),
        keys_(key_layout(resident.format, shape)),
        values_(value_layout(resident.format, shape)) {
    for (const bool keys : {true, false}) {
      if (!resident.format.rotated || coded_alone(code, resident.format, keys)) {
        continue;
      }
      for (int head = 0; head < shape.kv_heads; ++head) {
        bases_[keys ? 0 : 1].push_back(base_of_part(head, keys));
      }
    }
  }

  const std::byte* part(int head, bool keys) const {
    return resident_.head_page(head, page_) + (keys ? 0 : key_page_bytes(resident_.format.key(), shape_));
  }
  ResidualField operator()(int head, bool keys, int i) const {
    const PartLayout& layout = keys ? keys_ : values_;
    const CodeIndex at = code_index(layout, i);
    if (const auto& bases = bases_[keys ? 0 : 1]; !bases.empty()) {
      return bases[static_cast<size_t>(head)].field(at.token, at.dim);
    }
    const std::byte* packed = part(head, keys);
    if (layout.part.code == KvCode::nuq) {
      return nuq_field(packed, layout, at);
    }
    return residual_field(layout.part, code_at(packed, layout, at), group_of(packed, layout, at.group));
  }

 private:
  RotatedBase base_of_part(int head, bool keys) const {
    const PartLayout& layout = keys ? keys_ : values_;
    const std::byte* packed = part(head, keys);
    return {shape_, keys, layout.part.bits, [&](int token, int dim) -> RotatedBase::Code {
              const size_t index = keys ? key_index(token, dim, shape_) : value_index(token, dim);
              const CodeIndex at = code_index(layout, static_cast<int>(index));
              return {code_at(packed, layout, at), group_of(packed, layout, at.group)};
            }};
  }
  static ResidualField nuq_field(const std::byte* packed, const PartLayout& layout, const CodeIndex& at) {
    const NuqReader reader(packed, layout);
    uint32_t slot = 0;
    if (reader.find(at.dim, at.token, slot)) {
      return outlier_field(slot_value(slot));
    }
    ResidualGroup group = group_of(packed, layout, at.group);
    group.levels = reader.levels();
    return residual_field(layout.part, code_at(packed, layout, at), group);
  }
  static ResidualGroup group_of(const std::byte* packed, const PartLayout& layout, int group) {
    const std::byte* groups = packed + layout.code_bytes();
    uint16_t bits[2] = {};
    switch (layout.part.code) {
      case KvCode::plane:
      case KvCode::fp8:
        return {base_of(packed, layout, group), 0, nullptr};
      case KvCode::int8:
        std::memcpy(bits, groups + static_cast<ptrdiff_t>(group) * 2, sizeof(bits[0]));
        break;
      case KvCode::affine:
      case KvCode::nuq:
        std::memcpy(bits, groups + static_cast<ptrdiff_t>(group) * 4, sizeof(bits));
        break;
    }
    return {bits[0], bits[1], nullptr};
  }

  const KvView& resident_;
  int page_;
  const KvShape& shape_;
  PartLayout keys_;
  PartLayout values_;
  std::array<std::vector<RotatedBase>, 2> bases_;  // of K and of V, (heads); of rotated formats
};

}  // namespace

void encode_residuals(const EncodeArgs& args) {
  check(args.pages.size() <= EncodeArgs::kMostPages, "pages of one call");
  uint32_t units = 0;
  for (size_t i = 0; i < args.pages.size(); ++i) {
    const PackedFields fields(args.resident, args.first + static_cast<int>(i), args.shape, args.code);
    units += encode_page(args.shape, args.code, args.resident.format, args.pages[i], fields,
                         args.out + units * kResidualUnit);
    args.ends[i] = units;
  }
}

void decode_residuals(const DecodeArgs& args) {
  for (int i = 0; i < args.count; ++i) {
    const uint32_t begin = i == 0 ? 0 : args.ends[i - 1];
    const PackedFields fields(args.resident, i, args.shape, args.code);
    decode_page(
        args.shape, args.code, args.resident.format, args.in + begin * kResidualUnit, args.ends[i] - begin, fields,
        [&](int head, bool keys) { return fields.part(head, keys); },
        args.out + static_cast<size_t>(i) * page_bytes(args.shape));
  }
}

}  // namespace vericache
