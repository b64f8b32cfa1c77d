// Quantized head pages: codes cover the range, errors stay within half a step, hostile values do no harm.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "backend/kv_fixture.h"

namespace vericache::test {
namespace {

class Quantize : public testing::TestWithParam<Isa> {
 protected:
  std::unique_ptr<Kernels> kernels(const KvShape& shape) {
    return make_cpu_kernels(GetParam(), 1,
                            {.shape = shape, .heads = shape.kv_heads, .max_rows = 1, .max_context_tokens = 64});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, Quantize, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

struct Range {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  void add(float x) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
  // Half a step of the rounded-up scale, and the rounding of the result to bf16.
  float error(int bits) const {
    const float step = (high - low) / static_cast<float>((1 << bits) - 1) * (1 + 1.0f / 128);
    return 0.5f * step + std::max(std::abs(low), std::abs(high)) / 256;
  }
};

void check_page(Kernels& kernels, const KvShape& shape, const KvFormat& format, int tokens, Random& random) {
  Pages source(shape, {}, 1, random);
  Pages back(shape, {}, 1, random);
  for (int t = 0; t < tokens; ++t) {
    const size_t n = static_cast<size_t>(shape.head_dim);
    auto k = random.bf16s(n, 2.0f);
    k[3] = to_bf16(1.25f);  // a constant channel
    source.write(0, t, k.data(), random.bf16s(n).data());
  }
  std::vector<std::byte> packed(head_page_bytes(format, shape) + 1, std::byte{0x5a});
  kernels.quantize_head_page(source.head_page(0, 0), tokens, shape, format, packed.data());
  EXPECT_EQ(packed.back(), std::byte{0x5a});
  kernels.dequantize_head_page(packed.data(), shape, format, back.head_page(0, 0));
  for (int d = 0; d < shape.head_dim; ++d) {
    Range range;
    for (int t = 0; t < tokens; ++t) {
      range.add(to_float(source.key(0, t, d)));
    }
    const float error = format.key_bits == 16 ? 0.0f : range.error(format.key_bits);
    for (int t = 0; t < tokens; ++t) {
      ASSERT_NEAR(to_float(back.key(0, t, d)), to_float(source.key(0, t, d)), d == 3 ? 0.0f : error)
          << format.key_bits << " bits";
    }
  }
  for (int t = 0; t < tokens; ++t) {
    Range range;
    for (int d = 0; d < shape.head_dim; ++d) {
      range.add(to_float(source.value(0, t, d)));
    }
    const float error = format.value_bits == 16 ? 0.0f : range.error(format.value_bits);
    for (int d = 0; d < shape.head_dim; ++d) {
      ASSERT_NEAR(to_float(back.value(0, t, d)), to_float(source.value(0, t, d)), error)
          << format.value_bits << " bits";
    }
  }
}

TEST_P(Quantize, ErrorIsHalfAStep) {
  Random random(20);
  for (const int head_dim : {16, 64, 80, 128}) {
    const KvShape shape{1, 1, head_dim};
    const auto k = kernels(shape);
    for (const int key_bits : {2, 3, 4, 6, 8, 16}) {
      for (const int value_bits : {2, 3, 4, 6, 8, 16}) {
        for (const int tokens : {1, 17, 63, 64}) {
          check_page(*k, shape, {key_bits, value_bits}, tokens, random);
        }
      }
    }
  }
}

// The layout is a contract with compressors and the wire: written here by hand for a few elements.
TEST_P(Quantize, LayoutIsThatOfKvView) {
  Random random(21);
  const KvShape shape{1, 1, 32};
  const auto k = kernels(shape);
  for (const int bits : {2, 3, 4, 6, 8}) {
    Pages source(shape, {}, 1, random);
    for (int t = 0; t < kPageTokens; ++t) {
      source.write(0, t, random.bf16s(32).data(), random.bf16s(32).data());
    }
    std::vector<std::byte> packed(head_page_bytes({bits, bits}, shape));
    k->quantize_head_page(source.head_page(0, 0), kPageTokens, shape, {bits, bits}, packed.data());
    for (const int t : {0, 5, 16, 63}) {
      for (const int d : {0, 1, 2, 3, 31}) {
        const int row = t / 16 * 16 + d / 2;
        const int lane = t % 16;
        int code = 0;
        if (bits == 6) {  // a plane of 4 bits, then one of 2
          code = static_cast<int>(packed[static_cast<size_t>(row * 16 + lane)]) >> (4 * (d % 2)) & 15;
          code = code << 2 | (static_cast<int>(packed[static_cast<size_t>(64 * 16 + row / 2 * 16 + lane)]) >>
                                  (4 * (row % 2) + 2 * (d % 2)) &
                              3);
        } else if (bits == 3) {  // 2 bits, then 1
          code =
              static_cast<int>(packed[static_cast<size_t>(row / 2 * 16 + lane)]) >> (4 * (row % 2) + 2 * (d % 2)) & 3;
          code = code << 1 | (static_cast<int>(packed[static_cast<size_t>(64 * 8 + row / 4 * 16 + lane)]) >>
                                  (2 * (row % 4) + d % 2) &
                              1);
        } else if (bits == 8) {
          code = static_cast<int>(packed[static_cast<size_t>(row * 32 + 2 * lane + d % 2)]);
        } else if (bits == 4) {
          code = static_cast<int>(packed[static_cast<size_t>(row * 16 + lane)]) >> (4 * (d % 2)) & 15;
        } else {
          code =
              static_cast<int>(packed[static_cast<size_t>(row / 2 * 16 + lane)]) >> (4 * (row % 2) + 2 * (d % 2)) & 3;
        }
        bf16 affine[2];
        std::memcpy(affine, packed.data() + 64 * 32 * bits / 8 + d * 4, 4);
        const float scale = to_float(affine[0]);
        const float minimum = to_float(affine[1]);
        const float x = to_float(source.key(0, t, d));
        ASSERT_NEAR(minimum + static_cast<float>(code) * scale, x, scale * 0.501f);
        ASSERT_LE(minimum, x);
        ASSERT_GE(minimum + scale * static_cast<float>((1 << bits) - 1), x * (x > 0 ? 0.9999f : 1.0001f));
      }
    }
  }
}

// Table look-ups and arithmetic give the same bits where both fuse the multiply-add.
TEST(QuantizeClasses, AgreeBitForBit) {
  if (!isa_supported(Isa::avx512)) {
    GTEST_SKIP() << "no AVX-512 here";
  }
  Random random(23);
  const KvShape shape{1, 1, 80};
  const auto a = make_cpu_kernels(Isa::avx2, 1, {shape, 1, 1, 64});
  const auto b = make_cpu_kernels(Isa::avx512, 1, {shape, 1, 1, 64});
  for (const int bits : {2, 3, 4, 6, 8}) {
    std::vector<std::byte> packed(head_page_bytes({bits, bits}, shape));
    for (std::byte& byte : packed) {
      byte = static_cast<std::byte>(random.below(256));
    }
    std::vector<std::byte> of_a(head_page_bytes({}, shape));
    std::vector<std::byte> of_b(of_a.size());
    a->dequantize_head_page(packed.data(), shape, {bits, bits}, of_a.data());
    b->dequantize_head_page(packed.data(), shape, {bits, bits}, of_b.data());
    EXPECT_TRUE(of_a == of_b) << bits << " bits";
  }
}

TEST_P(Quantize, ValuesThatAreNotFiniteDoNoHarm) {
  Random random(22);
  const KvShape shape{1, 1, 64};
  const auto k = kernels(shape);
  for (const int bits : {2, 3, 4, 6, 8}) {
    std::vector<bf16> source(head_page_bytes({}, shape) / 2);
    for (bf16& x : source) {
      x = bf16{static_cast<uint16_t>(random.below(65536))};
    }
    std::vector<std::byte> packed(head_page_bytes({bits, bits}, shape));
    std::vector<std::byte> back(head_page_bytes({}, shape));
    k->quantize_head_page(reinterpret_cast<const std::byte*>(source.data()), 64, shape, {bits, bits}, packed.data());
    k->dequantize_head_page(packed.data(), shape, {bits, bits}, back.data());
  }
}

}  // namespace
}  // namespace vericache::test
