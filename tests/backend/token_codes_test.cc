// Codes that are read by token: plane codes are the bf16's own bits, errors stay within what the bits leave open, and
// nothing that is read is ever infinite, whatever was written.
#include "backend/kv_codes.h"

#include <gtest/gtest.h>

#include <cmath>

#include "backend/packed_page.h"

namespace vericache::test {
namespace {

constexpr KvFormat kFormats[] = {{6, 6, KvCode::plane}, {7, 7, KvCode::plane}, {8, 8, KvCode::plane},
                                 {9, 9, KvCode::plane}, {9, 6, KvCode::plane}, {16, 7, KvCode::plane},
                                 {8, 8, KvCode::fp8},   {8, 8, KvCode::int8}};

class TokenCodes : public testing::TestWithParam<Isa> {
 protected:
  std::unique_ptr<Kernels> kernels(const KvShape& shape) {
    return make_cpu_kernels(GetParam(), 1,
                            {.shape = shape, .heads = shape.kv_heads, .max_rows = 1, .max_context_tokens = 64});
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, TokenCodes, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return isa_test_name(info); });

uint32_t largest(const Page& page, bool keys, int token, KvCode code, int tokens) {
  uint32_t top = 0;
  for (int i = 0; i < page.values(keys); ++i) {
    if (token < tokens && code_index(page.layout(keys), i).token == token) {
      top = std::max(top, ranked_magnitude(page.original(keys, i).bits, code));
    }
  }
  return top;
}

// Every code is what kv_codes.h makes of its value, and is read as it says.
void expect_codes(const Page& page, bool keys, int tokens) {
  const KvPart part = keys ? page.format.key() : page.format.value();
  const PartLayout layout = page.layout(keys);
  if (part.exact()) {
    return;
  }
  std::vector<uint32_t> tops;
  for (int t = 0; t < kPageTokens; ++t) {
    tops.push_back(largest(page, keys, t, part.code, tokens));
    if (part.code != KvCode::int8) {
      ASSERT_EQ(base_of(page.part(keys), layout, t), tops.back() >> 7);
    }
  }
  for (int i = 0; i < page.values(keys); ++i) {
    const CodeIndex at = code_index(layout, i);
    const uint32_t value = page.original(keys, i).bits;
    const uint32_t code = code_at(page.part(keys), layout, at);
    const bf16 read = page.read(keys, i);
    const uint32_t top = tops[static_cast<size_t>(at.token)];
    if (at.token >= tokens) {
      ASSERT_EQ(code, 0u);
    } else if (part.code == KvCode::int8) {
      const float scale = float_of_bits(int8_scale(top) << 16);
      ASSERT_EQ(read, to_bf16(static_cast<float>(int8_of(code)) * scale));
      const float x = to_float(page.original(keys, i));
      ASSERT_TRUE(!std::isfinite(x) || scale == 0 || std::abs(x) > 1e37f ||
                  std::abs(static_cast<float>(int8_of(code)) - x / scale) < 0.51f)
          << x;
    } else {
      ASSERT_EQ(code, plane_code(value, part, top >> 7)) << std::hex << value;
      ASSERT_EQ(read.bits, plane_value(code, part, top >> 7)) << std::hex << value;
    }
    ASSERT_TRUE(std::isfinite(to_float(read)));
  }
}

TEST_P(TokenCodes, CodesAreThoseOfOneValueWhateverItIs) {
  Random random(80);
  for (const int head_dim : {16, 48, 64, 128}) {
    const KvShape shape{1, 1, head_dim};
    const auto k = kernels(shape);
    for (const KvFormat& format : kFormats) {
      Page page(shape, format);
      for (const int tokens : {64, 17}) {
        for (bf16& x : page.bytes) {
          x = tokens == 64 ? to_bf16(random.normal()) : hostile(random);
        }
        page.pack(*k, tokens);
        expect_codes(page, true, tokens);
        expect_codes(page, false, tokens);
      }
    }
  }
}

// What the residual of a plane code has to add: the rest of the mantissa and, of escapes, the exponent. Nothing else.
TEST(PlaneCodes, HoldTheBitsOfTheValue) {
  for (const int bits : {6, 7, 8, 9}) {
    const KvPart part{bits, KvCode::plane};
    const int kept = bits - 5;
    for (const uint32_t base : {0u, 3u, 14u, 15u, 120u, 254u}) {
      for (uint32_t value = 0; value < 65536; ++value) {
        const uint32_t exponent = value >> 7 & 255u;
        if (exponent > base && exponent != kSpecialExponent) {
          continue;
        }
        const PlaneBits code = plane_bits(plane_code(value, part, base), bits);
        const bool escapes = exponent == kSpecialExponent || base - exponent >= 15;
        ASSERT_EQ(code.distance == 15, escapes);
        const uint32_t known = escapes ? exponent : base - code.distance;
        ASSERT_EQ(code.sign << 15 | known << 7 | code.mantissa << (7 - kept) | (value & ((1u << (7 - kept)) - 1)),
                  value);
      }
    }
  }
}

// The error of a value within 2^14 of its token's largest, as a share of the value; of others, of the largest.
TEST_P(TokenCodes, ErrorsStayWithinWhatTheBitsLeaveOpen) {
  Random random(81);
  const KvShape shape{1, 1, 64};
  const auto k = kernels(shape);
  for (const KvFormat& format : kFormats) {
    Page page(shape, format);
    for (bf16& x : page.bytes) {
      x = to_bf16(random.normal(std::exp2(static_cast<float>(random.between(-20, 3)))));
    }
    page.pack(*k, kPageTokens);
    for (const bool keys : {true, false}) {
      const KvPart part = keys ? format.key() : format.value();
      for (int i = 0; i < page.values(keys); ++i) {
        const float x = to_float(page.original(keys, i));
        const float error = std::abs(to_float(page.read(keys, i)) - x);
        const float top = to_float(
            bf16{static_cast<uint16_t>(largest(page, keys, code_index(page.layout(keys), i).token, part.code, 64))});
        const float half_step = std::exp2(-static_cast<float>(part.bits - 4));
        const float bound = part.exact()                ? 0
                            : part.code == KvCode::int8 ? 0.51f * top * 1.01f / 127 + top / 256
                                                        : std::max(std::abs(x) * half_step, top / 16384);
        ASSERT_LE(error, bound) << x << " beside " << top;
      }
    }
  }
}

// Vector classes agree bit for bit: drafts on one machine are drafts on another.
TEST(TokenCodesClasses, AgreeBitForBit) {
  Random random(82);
  expect_classes_agree(kFormats, random);
}

}  // namespace
}  // namespace vericache::test
