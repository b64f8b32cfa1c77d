// What the tests of codes value by value share: a head page of the CPU beside its codes and what is read of them.
// Plain values; each test owns its own.
#pragma once

#include <gtest/gtest.h>

#include "backend/cpu/codes.h"
#include "backend/kv_fixture.h"

namespace vericache::test {

// A head page and its codes.
struct Page {
  Page(const KvShape& shape, const KvFormat& format) : shape(shape), format(format) {
    bytes.resize(head_page_bytes({}, shape) / 2);
    codes.assign(head_page_bytes(format, shape) + 1, std::byte{0x5a});
  }
  void pack(Kernels& kernels, int tokens) {
    kernels.quantize_head_page(reinterpret_cast<const std::byte*>(bytes.data()), tokens, shape, format, codes.data());
    EXPECT_EQ(codes.back(), std::byte{0x5a});
    back.resize(bytes.size());
    kernels.dequantize_head_page(codes.data(), shape, format, reinterpret_cast<std::byte*>(back.data()));
  }
  PartLayout layout(bool keys) const { return keys ? key_layout(format, shape) : value_layout(format, shape); }
  const std::byte* part(bool keys) const { return codes.data() + (keys ? 0 : key_page_bytes(format.key(), shape)); }
  int values(bool keys) const { return kPageTokens * (keys ? shape.key_dim() : shape.head_dim); }
  size_t first(bool keys) const { return keys ? 0 : static_cast<size_t>(values(true)); }
  bf16 original(bool keys, int index) const { return bytes[first(keys) + static_cast<size_t>(index)]; }
  bf16 read(bool keys, int index) const { return back[first(keys) + static_cast<size_t>(index)]; }

  KvShape shape;
  KvFormat format;
  std::vector<bf16> bytes;
  std::vector<std::byte> codes;
  std::vector<bf16> back;
};

// Numbers as a model makes them, and among them all that a bf16 can be.
inline bf16 hostile(Random& random) {
  switch (random.below(8)) {
    case 0:
      return bf16{static_cast<uint16_t>(random.below(65536))};
    case 1:
      return bf16{static_cast<uint16_t>(random.below(2) << 15)};
    case 2:
      return bf16{static_cast<uint16_t>(0x7f7f | random.below(2) << 15)};
    case 3:
      return bf16{static_cast<uint16_t>(0x7f80 | random.below(2) << 15 | random.below(2))};
    case 4:
      return bf16{static_cast<uint16_t>(random.below(128))};
    default:
      return to_bf16(random.normal());
  }
}

// Of hostile pages the codes, and what is read of them, are the same bits on every vector class.
inline void expect_classes_agree(std::span<const KvFormat> formats, Random& random) {
  const KvShape shape{1, 1, 80};
  const auto portable = make_cpu_kernels(Isa::portable, 1, {shape, 1, 1, 64});
  for (const Isa isa : supported_isas()) {
    const auto other = make_cpu_kernels(isa, 1, {shape, 1, 1, 64});
    for (const KvFormat& format : formats) {
      Page page(shape, format);
      for (bf16& x : page.bytes) {
        x = hostile(random);
      }
      Page again = page;
      page.pack(*portable, 50);
      again.pack(*other, 50);
      EXPECT_TRUE(page.codes == again.codes) << isa_name(isa);
      EXPECT_TRUE(page.back == again.back) << isa_name(isa);
    }
  }
}

}  // namespace vericache::test
