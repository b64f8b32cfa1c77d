// Encoded pages of a GPU: byte for byte what the plain coder makes of the same resident codes, and back.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>

#include "backend/cuda/chunk_layout.h"
#include "backend/residual_pages.h"
#include "backend/residual_rows.h"
#include "backend/rotated_residual.h"

namespace vericache::test {
namespace {

// A code of a head page in the GPU's order.
RotatedBase::Code code_of(const std::byte* head_page, const KvFormat& format, int head_dim, bool keys, int token,
                          int dim) {
  const KvPart own = keys ? format.key() : format.value();
  const std::byte* part = head_page + (keys ? 0 : cuda::bytes_of(cuda::key_pieces(format.key(), head_dim)));
  uint32_t codes[8];
  if (keys) {
    cuda::key_codes(part, own, head_dim, token, dim / 8 * 8, codes);
  } else {
    cuda::value_codes(part, own, head_dim, token / 8 * 8, dim, codes);
  }
  ResidualGroup group{cuda::base_of(part, token), 0};
  if (own.code == KvCode::int8) {
    uint16_t scale;
    std::memcpy(&scale, part + static_cast<ptrdiff_t>(token) * 2, sizeof(scale));
    group = {scale, 0};
  } else if (!own.by_token()) {
    const int groups = keys ? head_dim : kPageTokens;
    const cuda::AffineBits affine = cuda::affine_of(part, keys ? dim : token, groups);
    group = {affine.scale, affine.minimum, cuda::levels_of(part, groups)};
  }
  return {codes[keys ? dim % 8 : token % 8], group};
}

// The slot of an outlier in the GPU's order; null where the value is none.
std::optional<uint32_t> outlier_of(const std::byte* head_page, const KvFormat& format, int head_dim, bool keys,
                                   int token, int dim) {
  const KvPart own = keys ? format.key() : format.value();
  const std::byte* part = head_page + (keys ? 0 : cuda::bytes_of(cuda::key_pieces(format.key(), head_dim)));
  const std::byte* slots = part + 4 * (keys ? head_dim : kPageTokens) + kNuqLevels;
  for (int slot = 0; own.code == KvCode::nuq && slot < outlier_slots(own, head_dim); ++slot) {
    const uint32_t read = cuda::word_at(slots + 4 * slot);
    if (slot_place(read) == outlier_place(dim, token)) {
      return read;
    }
  }
  return std::nullopt;
}

// The fields of a page whose packed head pages lie one after the other.
class Fields {
 public:
  Fields(const std::byte* packed, const KvShape& shape, const KvFormat& format)
      : packed_(packed), shape_(shape), format_(format) {
    for (int head = 0; format.rotated && head < shape.kv_heads; ++head) {
      for (const bool keys : {true, false}) {
        const KvPart part = keys ? format.key() : format.value();
        bases_.emplace_back(shape, keys, part.bits, [&](int token, int dim) {
          return part.exact() ? RotatedBase::Code{}
                              : code_of(head_page(head), format, shape.head_dim, keys, token, dim);
        });
      }
    }
  }
  // layout.h turned round.
  ResidualField operator()(int head, bool keys, int i) const {
    const int head_dim = shape_.head_dim;
    const int token = keys ? i / 32 % kPageTokens : i / (32 * head_dim) * 32 + i % 32;
    const int dim = keys ? i / (32 * kPageTokens) * 32 + i % 32 : i / 32 % head_dim;
    if (format_.rotated) {
      return bases_[static_cast<size_t>(2 * head + (keys ? 0 : 1))].field(token, dim);
    }
    if (const auto slot = outlier_of(head_page(head), format_, head_dim, keys, token, dim)) {
      return outlier_field(slot_value(*slot));
    }
    const auto [code, group] = code_of(head_page(head), format_, head_dim, keys, token, dim);
    return residual_field(keys ? format_.key() : format_.value(), code, group);
  }

 private:
  const std::byte* head_page(int head) const {
    return packed_ + static_cast<size_t>(head) * head_page_bytes(format_, shape_);
  }
  const std::byte* packed_;
  KvShape shape_;
  KvFormat format_;
  std::vector<RotatedBase> bases_;  // (heads, K and V)
};

// The first row of the first page that differs, with its ends and its first halves.
std::string first_strange(const KvShape& shape, const std::vector<std::byte>& coded,
                          const std::vector<std::byte>& expected) {
  uint32_t begin = residual_header_units(shape);
  const int rows = residual_rows(shape);
  for (int head = 0; head < shape.kv_heads; ++head) {
    const auto half = [&](const std::vector<std::byte>& of, int index) {
      uint16_t out;
      std::memcpy(&out, of.data() + begin * kResidualUnit + static_cast<size_t>(index) * 2, sizeof(out));
      return out;
    };
    for (int row = 0; row < rows; ++row) {
      const int first = row == 0 ? rows : half(expected, row - 1);
      for (int i = first; i < half(expected, row); ++i) {
        if (half(coded, i) != half(expected, i) || half(coded, row) != half(expected, row)) {
          return fmt::format(
              ": head {}, row {} ends at {}, not {}; half {} is {:04x}, not {:04x}; begins with {:04x} {:04x}", head,
              row, half(coded, row), half(expected, row), i - first, half(coded, i), half(expected, i),
              half(coded, first), half(expected, first));
        }
      }
    }
    begin = cuda::word_at(expected.data() + static_cast<size_t>(head) * 4);
  }
  return ": not in the first page";
}

TEST(ResidualsOnGpu, AreThoseOfThePlainCoder) {
  setenv("VERICACHE_TEST_DEVICE", "cuda", 1);
  Random random(81);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{.layers = 1, .kv_heads = head_dim == 32 ? 5 : 2, .head_dim = head_dim};
    for (const KvFormat& format : {format_of(2, 2),
                                   format_of(4, 4),
                                   format_of(8, 8),
                                   format_of(16, 4),
                                   format_of(8, 16),
                                   format_of(3, 6),
                                   rotated_of(2, 2),
                                   rotated_of(3, 3),
                                   rotated_of(4, 4),
                                   rotated_of(6, 6),
                                   rotated_of(8, 8),
                                   rotated_of(3, 8),
                                   rotated_of(16, 2),
                                   rotated_of(4, 16),
                                   KvFormat{8, 8, KvCode::plane},
                                   KvFormat{6, 9, KvCode::plane},
                                   KvFormat{7, 16, KvCode::plane},
                                   KvFormat{8, 8, KvCode::fp8},
                                   KvFormat{8, 8, KvCode::int8},
                                   KvFormat{4, 4, KvCode::nuq, false, 10},
                                   KvFormat{3, 2, KvCode::nuq, false, 30},
                                   KvFormat{2, 16, KvCode::nuq, false, 0},
                                   KvFormat{16, 3, KvCode::nuq, false, 10}}) {
      ResidualPages pages(shape, format, 3);
      for (const Filling filling : {Filling::normal, Filling::keyed, Filling::sparse, Filling::specials}) {
        pages.fill(filling, random);
        for (const ResidualCode code : {ResidualCode::lossless, ResidualCode::resident}) {
          const std::vector<std::byte> coded = pages.encode(code);
          ASSERT_FALSE(coded.empty());
          const std::vector<std::byte> packed = pages.packed();
          std::vector<std::byte> expected;
          for (int page = 0; page < 3; ++page) {
            std::vector<std::byte> out(residual_bound(shape));
            const Fields fields(
                packed.data() + static_cast<size_t>(page * shape.kv_heads) * head_page_bytes(format, shape), shape,
                format);
            const uint32_t units = encode_page(shape, code, format,
                                               reinterpret_cast<const std::byte*>(pages.values().data()) +
                                                   static_cast<size_t>(page) * page_bytes(shape),
                                               fields, out.data());
            expected.insert(expected.end(), out.begin(), out.begin() + static_cast<ptrdiff_t>(units * kResidualUnit));
            EXPECT_EQ(pages.ends()[page] * kResidualUnit, expected.size());
          }
          const auto differs = std::mismatch(coded.begin(), coded.end(), expected.begin(), expected.end());
          ASSERT_EQ(differs.first, coded.end())
              << head_dim << " dims, bits " << format.key_bits << ", " << format.value_bits
              << (format.rotated ? ", rotated" : "") << ", format " << static_cast<int>(format.code) << ", code "
              << static_cast<int>(code) << ", filling " << static_cast<int>(filling) << ", byte "
              << differs.first - coded.begin() << " of " << coded.size() << first_strange(shape, coded, expected);
          ASSERT_EQ(pages.decode(code, coded), pages.values());
          ASSERT_EQ(pages.mismatches(), 0u);
        }
      }
    }
  }
}

}  // namespace
}  // namespace vericache::test
