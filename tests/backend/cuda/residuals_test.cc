// Encoded pages of a GPU: byte for byte what the plain coder makes of the same resident codes, and back.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "backend/cuda/packed_layout.h"
#include "backend/residual_pages.h"
#include "backend/residual_rows.h"

namespace vericache::test {
namespace {

uint32_t word_at(const std::byte* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}
float affine_at(const std::byte* part, int index) {
  bf16 value;
  std::memcpy(&value, part + static_cast<ptrdiff_t>(index) * 2, sizeof(value));
  return to_float(value);
}

// Value i of a part, in the GPU's order.
ResidualField field_of(const std::byte* head_page, const KvFormat& format, int head_dim, bool keys, int i) {
  const int bits = keys ? format.key_bits : format.value_bits;
  const std::byte* part = head_page + (keys ? 0 : cuda::bytes_of(cuda::key_pieces(format.key_bits, head_dim)));
  const int groups = keys ? head_dim : kPageTokens;
  const int plane_bits = bits == 2 ? 2 : 4;
  // layout.h turned round.
  const int token = keys ? i / 32 % kPageTokens : i / (32 * head_dim) * 32 + i % 32;
  const int dim = keys ? i / (32 * kPageTokens) * 32 + i % 32 : i / 32 % head_dim;
  const cuda::CodePlace place =
      keys ? cuda::key_place(token, dim, plane_bits) : cuda::value_place(token, dim, plane_bits);
  const std::byte* planes = part + static_cast<ptrdiff_t>(groups) * 4;
  uint32_t code = word_at(planes + static_cast<ptrdiff_t>(place.word) * 4) >> place.shift & ((1u << plane_bits) - 1);
  if (bits == 8) {
    const std::byte* low = planes + cuda::plane_bytes(4, head_dim);
    code = code << 4 | (word_at(low + static_cast<ptrdiff_t>(place.word) * 4) >> place.shift & 15u);
  }
  const int group = keys ? dim : token;
  return affine_field(code, affine_at(part, group), affine_at(part, groups + group));
}

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
    begin = word_at(expected.data() + static_cast<size_t>(head) * 4);
  }
  return ": not in the first page";
}

TEST(ResidualsOnGpu, AreThoseOfThePlainCoder) {
  setenv("VERICACHE_TEST_DEVICE", "cuda", 1);
  Random random(81);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{.layers = 1, .kv_heads = head_dim == 32 ? 5 : 2, .head_dim = head_dim};
    for (const auto& [key_bits, value_bits] : {std::pair{2, 2}, {4, 4}, {8, 8}, {16, 4}, {8, 16}}) {
      const KvFormat format = format_of(key_bits, value_bits);
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
            const auto head_page = [&](int head) {
              return packed.data() + static_cast<size_t>(page * shape.kv_heads + head) * head_page_bytes(format, shape);
            };
            const uint32_t units = encode_page(
                shape, code, format,
                reinterpret_cast<const std::byte*>(pages.values().data()) +
                    static_cast<size_t>(page) * page_bytes(shape),
                [&](int head, bool keys, int i) { return field_of(head_page(head), format, head_dim, keys, i); },
                out.data());
            expected.insert(expected.end(), out.begin(), out.begin() + static_cast<ptrdiff_t>(units * kResidualUnit));
            EXPECT_EQ(pages.ends()[page] * kResidualUnit, expected.size());
          }
          const auto differs = std::mismatch(coded.begin(), coded.end(), expected.begin(), expected.end());
          ASSERT_EQ(differs.first, coded.end())
              << head_dim << " dims, bits " << key_bits << ", " << value_bits << ", code " << static_cast<int>(code)
              << ", filling " << static_cast<int>(filling) << ", byte " << differs.first - coded.begin() << " of "
              << coded.size() << first_strange(shape, coded, expected);
          ASSERT_EQ(pages.decode(code, coded), pages.values());
        }
      }
    }
  }
}

}  // namespace
}  // namespace vericache::test
