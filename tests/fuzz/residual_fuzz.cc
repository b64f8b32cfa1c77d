// Any resident codes: pages of any values come back from their encoded form, bit for bit; and any bytes taken for an
// encoded page give a page, with nothing read or written outside.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "backend/residual_rows.h"
#include "base/check.h"

namespace {

using namespace vericache;

// The input's bytes, again and again.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte(size_t at) const { return size_ == 0 ? 0 : data_[at % size_]; }
  uint32_t half(size_t index) const { return byte(2 * index) | static_cast<uint32_t>(byte(2 * index + 1)) << 8; }

 private:
  const uint8_t* data_;
  size_t size_;
};

struct Case {
  KvShape shape{.layers = 1, .kv_heads = 1, .head_dim = 32};
  ResidualCode code = ResidualCode::resident;
  KvFormat format;
};

Case choose(uint8_t first, uint8_t second) {
  constexpr KvFormat kFormats[] = {{2, 2},
                                   {3, 6},
                                   {4, 4},
                                   {8, 8},
                                   {16, 4},
                                   {4, 16},
                                   {8, 8, KvCode::plane},
                                   {6, 9, KvCode::plane},
                                   {8, 8, KvCode::fp8},
                                   {8, 8, KvCode::int8}};
  Case c;
  c.shape.kv_heads = 1 + first % 5;
  c.shape.head_dim = 16 << (first / 5 % 3);
  c.code = second % 4 == 0 ? ResidualCode::lossless : ResidualCode::resident;
  c.format = kFormats[second / 4 % std::size(kFormats)];
  return c;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) {
    return 0;
  }
  const Case c = choose(data[0], data[1]);
  const Bytes bytes(data + 2, size - 2);
  const auto field_of = [&](int head, bool keys, int i) {
    const KvPart part = keys ? c.format.key() : c.format.value();
    const auto at = static_cast<size_t>(i + (keys ? 0 : 7) + head * 3);
    return residual_field(part, bytes.byte(at) & ((1u << std::min(part.bits, 8)) - 1),
                          {part.by_token() && part.code != KvCode::int8 ? bytes.byte(at / 64) : bytes.half(at / 64),
                           bytes.half(at / 64 + 1)});
  };
  const size_t page = page_bytes(c.shape);
  std::vector<std::byte> values(page);
  for (size_t i = 0; i < page; ++i) {
    values[i] = static_cast<std::byte>(bytes.byte(i * 5 / 4));
  }
  // Where a part is exact the resident page has the values themselves.
  const auto resident_part = [&](int head, bool keys) {
    return values.data() + static_cast<size_t>(head) * head_page_bytes(KvFormat{}, c.shape) +
           (keys ? 0 : key_page_bytes(KvPart{}, c.shape));
  };
  std::vector<std::byte> coded(residual_bound(c.shape));
  const uint32_t units = encode_page(c.shape, c.code, c.format, values.data(), field_of, coded.data());
  check(units * kResidualUnit <= coded.size(), "an encoded page is within its bound");
  std::vector<std::byte> back(page);
  decode_page(c.shape, c.code, c.format, coded.data(), units, field_of, resident_part, back.data());
  check(std::memcmp(values.data(), back.data(), page) == 0, "every bit came back");

  const size_t hostile_units = (size - 2) / kResidualUnit;
  const auto* first = reinterpret_cast<const std::byte*>(data + 2);
  const std::vector<std::byte> hostile(first, first + hostile_units * kResidualUnit);
  decode_page(c.shape, c.code, c.format, hostile.data(), static_cast<uint32_t>(hostile_units), field_of, resident_part,
              back.data());
  return 0;
}
