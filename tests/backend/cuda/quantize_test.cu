// Quantized head pages on a GPU: the values that they stand for are the CPU's, bit for bit, and lie where the layout
// says.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "backend/cuda/packed_fixture.h"

namespace vericache::test {
namespace {

constexpr int kBits[] = {2, 3, 4, 6, 8, 16};

// Random tokens of one KV head, as both backends store them.
struct Values {
  Values(int head_dim, int count, Random& random) : head_dim(head_dim) {
    const size_t n = static_cast<size_t>(head_dim);
    const std::vector<float> spread = random.floats(n, 2.0f);
    for (int t = 0; t < count; ++t) {
      k.push_back(random.bf16s(n));
      v.push_back(random.bf16s(n, 0.1f + 0.1f * static_cast<float>(t % 7)));
      for (size_t d = 0; d < n; ++d) {
        k.back()[d] = to_bf16(to_float(k.back()[d]) * spread[d] + 4.0f * spread[n - 1 - d]);
      }
      k.back()[3] = to_bf16(1.25f);  // a constant channel
    }
    std::fill(v.back().begin(), v.back().end(), bf16{0});  // and a constant token
  }
  HostPage device_page(int first, int tokens) const {
    HostPage page(head_dim);
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < head_dim; ++d) {
        page.key(t, d) = k[static_cast<size_t>(first + t)][static_cast<size_t>(d)];
        page.value(t, d) = v[static_cast<size_t>(first + t)][static_cast<size_t>(d)];
      }
    }
    return page;
  }
  int head_dim;
  std::vector<std::vector<bf16>> k;
  std::vector<std::vector<bf16>> v;
};

// What the CPU makes of chosen tokens in one page: quantized there, and read back.
class Oracle {
 public:
  explicit Oracle(const KvShape& shape)
      : shape_{1, 1, shape.head_dim},
        kernels_(
            make_cpu_kernels(best_isa(), 1, {.shape = shape_, .heads = 1, .max_rows = 1, .max_context_tokens = 64})),
        random_(1),
        source_(shape_, {}, 1, random_),
        back_(shape_, {}, 1, random_) {}

  // The tokens' slots beyond `held` hold what `values` says; absent ones zero.
  void run(const Values& values, const std::vector<int>& tokens, int held, const KvFormat& format) {
    const std::vector<bf16> zeros(static_cast<size_t>(shape_.head_dim), bf16{0});
    for (int slot = 0; slot < kPageTokens; ++slot) {
      const bool present = slot < static_cast<int>(tokens.size());
      const size_t token = present ? static_cast<size_t>(tokens[static_cast<size_t>(slot)]) : 0;
      source_.write(0, slot, present ? values.k[token].data() : zeros.data(),
                    present ? values.v[token].data() : zeros.data());
    }
    std::vector<std::byte> packed(head_page_bytes(format, shape_));
    kernels_->quantize_head_page(source_.head_page(0, 0), held, shape_, format, packed.data());
    kernels_->dequantize_head_page(packed.data(), shape_, format, back_.head_page(0, 0));
  }
  // Equal bits in every slot; codes of a page of a GPU stand for these values.
  void expect_equal(HostPage page) const {
    for (int t = 0; t < kPageTokens; ++t) {
      for (int d = 0; d < shape_.head_dim; ++d) {
        ASSERT_EQ(page.key(t, d).bits, back_.key(0, t, d).bits) << "key of token " << t << ", channel " << d;
        ASSERT_EQ(page.value(t, d).bits, back_.value(0, t, d).bits) << "value of token " << t << ", dim " << d;
      }
    }
  }
  void expect_stored(const std::byte* page, const KvFormat& format) const {
    const int head_dim = shape_.head_dim;
    for (int t = 0; t < kPageTokens; ++t) {
      for (int d = 0; d < head_dim; ++d) {
        ASSERT_EQ(to_bf16(static_cast<float>(key_of(page, format, head_dim, t, d))).bits, back_.key(0, t, d).bits)
            << "key of token " << t << ", channel " << d;
        ASSERT_EQ(to_bf16(static_cast<float>(value_of(page, format, head_dim, t, d))).bits, back_.value(0, t, d).bits)
            << "value of token " << t << ", dim " << d;
      }
    }
  }

 private:
  KvShape shape_;
  std::unique_ptr<Kernels> kernels_;
  Random random_;
  Pages source_;
  Pages back_;
};

std::vector<int> range_of(int first, int count) {
  std::vector<int> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), first);
  return out;
}

void check_head_page(const KvShape& shape, const KvFormat& format, int tokens, Oracle& oracle, Random& random) {
  const Values values(shape.head_dim, kPageTokens, random);
  HostPage page = values.device_page(0, kPageTokens);
  const DeviceArray<std::byte> source(page.bytes());
  const size_t bytes = head_page_bytes(format, shape);
  const DeviceArray<std::byte> packed(bytes + 16);
  const DeviceArray<std::byte> back(page.bytes().size());
  cuda::quantize_head_page(source.data(), tokens, shape, format, packed.data(), nullptr);
  cuda::dequantize_head_page(packed.data(), shape, format, back.data(), nullptr);
  finish();
  const std::vector<std::byte> stored = packed.read();
  for (size_t i = bytes; i < stored.size(); ++i) {
    ASSERT_EQ(stored[i], std::byte{0xff}) << "what lies behind the page is not touched";
  }
  oracle.run(values, range_of(0, kPageTokens), tokens, format);
  if (!format.rotated) {
    oracle.expect_stored(stored.data(), format);
  }
  page.bytes() = back.read();
  oracle.expect_equal(page);
}

TEST(CudaQuantize, ValuesByTokenAreThoseOfTheCpu) {
  Random random(64);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    Oracle oracle(shape);
    for (const KvFormat& format : kByToken) {
      SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " and " << format.value_bits
                                      << " bits, code " << static_cast<int>(format.code));
      check_head_page(shape, format, kPageTokens, oracle, random);
      check_head_page(shape, format, random.between(1, kPageTokens - 1), oracle, random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

// The stored values at once: outliers, levels and codes are the CPU's.
TEST(CudaQuantize, NonUniformValuesAreThoseOfTheCpu) {
  Random random(68);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    Oracle oracle(shape);
    for (const KvFormat& format : kNuq) {
      SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " and " << format.value_bits
                                      << " bits, outliers " << format.outliers);
      check_head_page(shape, format, kPageTokens, oracle, random);
      check_head_page(shape, format, random.between(1, kPageTokens - 1), oracle, random);
      check_head_page(shape, format, 1, oracle, random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(CudaQuantize, ValuesAreThoseOfTheCpu) {
  Random random(60);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    Oracle oracle(shape);
    for (const int key_bits : kBits) {
      for (const int value_bits : kBits) {
        SCOPED_TRACE(testing::Message() << head_dim << " dims, " << key_bits << " and " << value_bits << " bits");
        check_head_page(shape, {key_bits, value_bits}, kPageTokens, oracle, random);
        check_head_page(shape, {key_bits, value_bits}, random.between(1, kPageTokens - 1), oracle, random);
        if (testing::Test::HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

// Full KV of several heads: past pages, then the tail's, at scattered places.
struct Full {
  Full(const KvShape& shape, int count, int past_pages, Random& random)
      : past(shape, {}, count, random), tail(shape, {}, count, random), past_pages(past_pages) {
    for (int head = 0; head < shape.kv_heads; ++head) {
      heads.emplace_back(shape.head_dim, count * kPageTokens, random);
      for (int page = 0; page < count; ++page) {
        (page < past_pages ? past : tail)
            .write(head, page < past_pages ? page : page - past_pages,
                   heads.back().device_page(page * kPageTokens, kPageTokens).bytes());
      }
    }
    past.hold(std::vector<int>(static_cast<size_t>(shape.kv_heads), past_pages * kPageTokens));
  }
  LayerKv kv() const { return {past.view(), tail.view(), past_pages * kPageTokens}; }
  DevicePages past;
  DevicePages tail;
  int past_pages;
  std::vector<Values> heads;
};

HostPage dequantized(const std::vector<std::byte>& stored, const KvShape& shape, const KvFormat& format) {
  HostPage page(shape.head_dim);
  const DeviceArray<std::byte> packed(stored);
  const DeviceArray<std::byte> back(page.bytes().size());
  cuda::dequantize_head_page(packed.data(), shape, format, back.data(), nullptr);
  finish();
  page.bytes() = back.read();
  return page;
}

bool untouched(const std::vector<std::byte>& page) {
  return std::all_of(page.begin(), page.end(), [](std::byte x) { return x == std::byte{0xff}; });
}

TEST(CudaQuantize, RotatedValuesAreThoseOfTheCpu) {
  Random random(67);
  for (const int head_dim : {32, 64, 96, 128}) {
    const KvShape shape{1, 1, head_dim};
    Oracle oracle(shape);
    for (const KvFormat& format : kRotated) {
      SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " bits");
      check_head_page(shape, format, kPageTokens, oracle, random);
      check_head_page(shape, format, random.between(1, kPageTokens - 1), oracle, random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(CudaQuantize, PagesOfPastAndTail) {
  Random random(61);
  const int pages = 7;
  for (const KvFormat format : {KvFormat{4, 4}, KvFormat{2, 8}, KvFormat{8, 16}, KvFormat{16, 2}, KvFormat{3, 6},
                                KvFormat{8, 8, KvCode::plane}, KvFormat{3, 4, KvCode::nuq, false, 10}}) {
    const KvShape shape{1, 3, 64};
    const Full full(shape, pages, random.below(pages + 1), random);
    Oracle oracle(shape);
    DevicePages out(shape, format, pages, random);
    const int first = random.below(3);
    const int count = random.between(1, pages - first);
    cuda::quantize({.shape = shape, .full = full.kv(), .first = first, .count = count, .out = out.view()}, nullptr);
    finish();
    const auto stored = out.read();
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int page = 0; page < pages; ++page) {
        const auto& bytes = stored[static_cast<size_t>(head * pages + page)];
        if (page < first || page >= first + count) {
          ASSERT_TRUE(untouched(bytes));
          continue;
        }
        oracle.run(full.heads[static_cast<size_t>(head)], range_of(page * kPageTokens, kPageTokens), kPageTokens,
                   format);
        oracle.expect_equal(dequantized(bytes, shape, format));
      }
    }
  }
}

// differ: the heads keep fewer than `count`, each its own number.
void check_gather(const KvShape& shape, const KvFormat& format, int count, bool differ, Random& random) {
  const int pages = 6;
  const Full full(shape, pages, random.below(pages + 1), random);
  Oracle oracle(shape);
  DevicePages out(shape, format, pages, random);
  const int stride = count + random.below(5);
  std::vector<int> chosen(static_cast<size_t>(stride * shape.kv_heads), 1 << 30);
  std::vector<int> counts(static_cast<size_t>(shape.kv_heads), count);
  for (int head = 0; head < shape.kv_heads; ++head) {
    int& own = counts[static_cast<size_t>(head)];
    own = differ ? random.below(count + 1) : count;
    std::vector<int> all = range_of(0, pages * kPageTokens);
    std::shuffle(all.begin(), all.end(), random.engine());
    std::sort(all.begin(), all.begin() + own);
    std::copy_n(all.begin(), own, chosen.begin() + head * stride);
  }
  const DeviceArray<int> device_chosen(chosen);
  const DeviceArray<int> device_counts(counts);
  cuda::gather({.shape = shape,
                .full = full.kv(),
                .chosen = device_chosen.data(),
                .stride = stride,
                .count = count,
                .counts = differ ? device_counts.data() : nullptr,
                .out = out.view()},
               nullptr);
  finish();
  const auto stored = out.read();
  for (int head = 0; head < shape.kv_heads; ++head) {
    for (int page = 0; page < pages; ++page) {
      const auto& bytes = stored[static_cast<size_t>(head * pages + page)];
      const int held = std::min(kPageTokens, counts[static_cast<size_t>(head)] - page * kPageTokens);
      if (held <= 0) {
        ASSERT_TRUE(untouched(bytes));
        continue;
      }
      const auto first = chosen.begin() + head * stride + page * kPageTokens;
      oracle.run(full.heads[static_cast<size_t>(head)], {first, first + held}, held, format);
      oracle.expect_equal(dequantized(bytes, shape, format));
    }
  }
}

TEST(CudaQuantize, GatherKeepsTheChosen) {
  Random random(62);
  for (const int head_dim : {32, 64, 96, 128}) {
    for (const KvFormat format :
         {KvFormat{}, KvFormat{4, 4}, KvFormat{2, 2}, KvFormat{8, 8}, KvFormat{16, 4}, KvFormat{6, 3},
          KvFormat{7, 9, KvCode::plane}, KvFormat{8, 8, KvCode::int8}, KvFormat{4, 2, KvCode::nuq, false, 10}}) {
      for (const int count : {0, 64, random.between(1, 63), random.between(65, 6 * kPageTokens)}) {
        SCOPED_TRACE(testing::Message() << head_dim << " dims, " << format.key_bits << " and " << format.value_bits
                                        << " bits, " << count << " tokens");
        check_gather({1, 3, head_dim}, format, count, random.below(2) == 0, random);
        if (testing::Test::HasFatalFailure()) {
          return;
        }
      }
    }
  }
}

TEST(CudaQuantize, ValuesThatAreNotFiniteDoNoHarm) {
  Random random(63);
  const KvShape shape{1, 1, 64};
  HostPage page(shape.head_dim);
  for (const KvFormat& format : {KvFormat{2, 2}, KvFormat{4, 4}, KvFormat{8, 8}, KvFormat{2, 4, KvCode::nuq, false, 10},
                                 KvFormat{3, 3, KvCode::nuq, false, 0}}) {
    for (size_t i = 0; i < page.bytes().size() / 2; ++i) {
      keys_of(page.bytes().data())[i] = bf16{static_cast<uint16_t>(random.below(65536))};
    }
    const DeviceArray<std::byte> source(page.bytes());
    const DeviceArray<std::byte> packed(head_page_bytes(format, shape));
    const DeviceArray<std::byte> back(page.bytes().size());
    cuda::quantize_head_page(source.data(), kPageTokens, shape, format, packed.data(), nullptr);
    cuda::dequantize_head_page(packed.data(), shape, format, back.data(), nullptr);
    finish();
  }
}

// Whatever is stored, codes by token are the CPU's and are read as something finite.
TEST(CudaQuantize, HostileValuesByTokenAreReadAsTheCpuDoes) {
  Random random(66);
  for (const int head_dim : {32, 128}) {
    const KvShape shape{1, 1, head_dim};
    for (const KvFormat& format : kByToken) {
      Values values(head_dim, kPageTokens, random);
      for (auto* rows : {&values.k, &values.v}) {
        for (std::vector<bf16>& row : *rows) {
          for (bf16& x : row) {
            x = random.below(3) == 0 ? bf16{static_cast<uint16_t>(random.below(65536))} : x;
          }
        }
      }
      HostPage page = values.device_page(0, kPageTokens);
      const DeviceArray<std::byte> source(page.bytes());
      const DeviceArray<std::byte> packed(head_page_bytes(format, shape));
      const DeviceArray<std::byte> back(page.bytes().size());
      cuda::quantize_head_page(source.data(), kPageTokens, shape, format, packed.data(), nullptr);
      cuda::dequantize_head_page(packed.data(), shape, format, back.data(), nullptr);
      finish();
      Oracle oracle(shape);
      std::vector<int> tokens(kPageTokens);
      std::iota(tokens.begin(), tokens.end(), 0);
      oracle.run(values, tokens, kPageTokens, format);
      page.bytes() = back.read();
      oracle.expect_equal(page);
      for (int t = 0; t < kPageTokens; ++t) {
        for (int d = 0; d < head_dim; ++d) {
          ASSERT_TRUE(format.key().exact() || std::isfinite(to_float(page.key(t, d))));
          ASSERT_TRUE(std::isfinite(to_float(page.value(t, d))));
        }
      }
    }
  }
}

}  // namespace
}  // namespace vericache::test
