#include "backend/cpu/residuals.h"

#include "backend/residual_rows.h"
#include "base/check.h"

namespace vericache {
namespace {

// Codes, scales and minima of the resident head pages of one page, as kv_view.h lays them out.
class PackedFields {
 public:
  PackedFields(const KvView& resident, int page, const KvShape& shape)
      : resident_(resident), page_(page), shape_(shape) {}

  const std::byte* part(int head, bool keys) const {
    return resident_.head_page(head, page_) + (keys ? 0 : key_page_bytes(resident_.format.key_bits, shape_));
  }
  ResidualField operator()(int head, bool keys, int i) const {
    const std::byte* packed = part(head, keys);
    const int bits = keys ? resident_.format.key_bits : resident_.format.value_bits;
    // A panel row is 32 values: 16 lanes, two values each.
    const int pairs = (keys ? shape_.key_dim() : kPageTokens) / 2;
    const int row = i / 32;
    const int group = row % pairs * 2 + i % 2;
    const int values = kPageTokens * (keys ? shape_.key_dim() : shape_.head_dim);
    bf16 affine[2];
    std::memcpy(affine, packed + static_cast<size_t>(values * bits / 8 + group * 4), sizeof(affine));
    return affine_field(code(packed, bits, row, i % 32 / 2, i % 2), to_float(affine[0]), to_float(affine[1]));
  }

 private:
  static uint32_t code(const std::byte* packed, int bits, int row, int lane, int second) {
    if (bits == 8) {
      return std::to_integer<uint32_t>(packed[row * 32 + lane * 2 + second]);
    }
    if (bits == 4) {
      return std::to_integer<uint32_t>(packed[row * 16 + lane]) >> (4 * second) & 15;
    }
    return std::to_integer<uint32_t>(packed[row / 2 * 16 + lane]) >> (row % 2 * 4 + 2 * second) & 3;
  }

  const KvView& resident_;
  int page_;
  const KvShape& shape_;
};

}  // namespace

void encode_residuals(const EncodeArgs& args) {
  check(args.pages.size() <= EncodeArgs::kMostPages, "pages of one call");
  uint32_t units = 0;
  for (size_t i = 0; i < args.pages.size(); ++i) {
    const PackedFields fields(args.resident, args.first + static_cast<int>(i), args.shape);
    units += encode_page(args.shape, args.code, args.resident.format, args.pages[i], fields,
                         args.out + units * kResidualUnit);
    args.ends[i] = units;
  }
}

void decode_residuals(const DecodeArgs& args) {
  for (int i = 0; i < args.count; ++i) {
    const uint32_t begin = i == 0 ? 0 : args.ends[i - 1];
    const PackedFields fields(args.resident, i, args.shape);
    decode_page(
        args.shape, args.code, args.resident.format, args.in + begin * kResidualUnit, args.ends[i] - begin, fields,
        [&](int head, bool keys) { return fields.part(head, keys); },
        args.out + static_cast<size_t>(i) * page_bytes(args.shape));
  }
}

}  // namespace vericache
