// What the full KV of a trained model takes on the wire, header bits, padding and escapes counted, beside the order-0
// entropy of the same residuals. VERICACHE_KV_FILE names a file for the bf16 pages themselves, for other coders.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include "compress/paged.h"
#include "engine/engine.h"
#include "model/loaded_model.h"
#include "text/tokenizer.h"

namespace vericache {
namespace {

constexpr int kTokens = 2560;

// What of a trained model's KV is measured: bf16 pages by (layer, page), and what keys are rounded by, by layer.
struct Recorded {
  std::map<std::pair<int, int>, std::vector<bf16>> pages;
  std::map<int, std::vector<bf16>> rounding;
};

// Keeps what passes through it, layer by layer.
class Recorder final : public Compressor {
 public:
  explicit Recorder(Recorded& recorded) : recorded_(recorded) {}
  std::string name() const override { return inner_.name(); }
  KvFormat format() const override { return inner_.format(); }
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) override {
    const size_t head_bytes = head_page_bytes(KvFormat{}, full.shape);
    for (int page = fresh.begin / kPageTokens; page < fresh.end / kPageTokens; ++page) {
      std::vector<bf16>& to = recorded_.pages[{full.layer, page}];
      to.resize(page_bytes(full.shape) / sizeof(bf16));
      const int past = full.kv.tail_position / kPageTokens;
      for (int head = 0; head < full.shape.kv_heads; ++head) {
        const std::byte* from =
            page < past ? full.kv.past.head_page(head, page) : full.kv.tail.head_page(head, page - past);
        std::memcpy(reinterpret_cast<std::byte*>(to.data()) + static_cast<size_t>(head) * head_bytes, from, head_bytes);
      }
    }
    recorded_.rounding[full.layer].assign(seen.rounding, seen.rounding + rounding_bytes(full.shape) / sizeof(bf16));
    return inner_.compress(kernels, full, fresh, seen, out);
  }

 private:
  PagedCompressor inner_{KvFormat{4, 4, KvCode::affine, true}};
  Recorded& recorded_;
};

double entropy(const std::map<int, int64_t>& counts) {
  double total = 0;
  for (const auto& [symbol, count] : counts) {
    total += static_cast<double>(count);
  }
  double bits = 0;
  for (const auto& [symbol, count] : counts) {
    bits -= static_cast<double>(count) / total * std::log2(static_cast<double>(count) / total);
  }
  return bits;
}
int ordered(bf16 value) {
  const int magnitude = value.bits & 0x7fff;
  return value.bits >> 15 != 0 ? -magnitude : magnitude;
}

// Of the resident form of a page: what the wire carries, and the entropies of what is missing.
struct Measured {
  size_t bytes = 0;
  std::map<int, int64_t> keys;
  std::map<int, int64_t> values;
  std::map<int, int64_t> exponents;
};
void measure(Kernels& kernels, const KvShape& shape, const KvFormat& format, ResidualCode code,
             const std::vector<bf16>& page, const std::vector<bf16>& rounding, Measured& out) {
  const auto heads = static_cast<size_t>(shape.kv_heads);
  const size_t head_bytes = head_page_bytes(KvFormat{}, shape);
  const size_t packed_bytes = head_page_bytes(format, shape);
  const auto* plain = reinterpret_cast<const std::byte*>(page.data());
  std::vector<std::byte> packed(heads * packed_bytes);
  std::vector<bf16> back(head_bytes / sizeof(bf16));
  std::vector<std::byte*> full_table;
  std::vector<std::byte*> table;
  for (size_t head = 0; head < heads; ++head) {
    full_table.push_back(const_cast<std::byte*>(plain) + head * head_bytes);
    table.push_back(packed.data() + head * packed_bytes);
  }
  const KvView full{.format = {}, .head_pages = full_table.data(), .page_stride = 1, .tokens = nullptr};
  const KvView resident{.format = format, .head_pages = table.data(), .page_stride = 1, .tokens = nullptr};
  kernels.quantize({.shape = shape,
                    .full = {full, full, kPageTokens},
                    .first = 0,
                    .count = 1,
                    .out = resident,
                    .rounding = rounding.data()});
  for (size_t head = 0; head < heads; ++head) {
    kernels.dequantize_head_page(table[head], shape, format, reinterpret_cast<std::byte*>(back.data()));
    for (size_t i = 0; i < back.size(); ++i) {
      const bf16 value = page[head * back.size() + i];
      const bool key = i * sizeof(bf16) < key_page_bytes(KvPart{}, shape);
      ++(key ? out.keys : out.values)[ordered(value) - ordered(back[i])];
      ++out.exponents[value.bits >> 7 & 0xff];
    }
  }
  std::vector<std::byte> coded(residual_bound(shape));
  uint32_t units = 0;
  kernels.encode({.shape = shape,
                  .code = code,
                  .pages = {&plain, 1},
                  .resident = resident,
                  .first = 0,
                  .sizes = nullptr,
                  .out = coded.data(),
                  .ends = &units});
  out.bytes += units * kResidualUnit;
}

TEST(ResidualBits, OfATrainedModelsKvAreWithinTheirTargets) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "a measurement on one thread: nothing to race, and minutes long";
#endif
  if (test::tested_device() != DeviceKind::cpu) {
    GTEST_SKIP() << "the codes are the same; memory is read where it lies";
  }
  const std::filesystem::path directory = std::filesystem::path(VERICACHE_MODELS) / "vericode-26m";
  const LoadedModel loaded(directory, {.max_rows = 512, .max_sequences = 1});
  std::ifstream file(std::filesystem::path(VERICACHE_TEST_DATA) / "../../examples/tool-calls-8k.txt");
  std::stringstream text;
  text << file.rdbuf();
  std::vector<TokenId> prompt = Tokenizer::load(directory).encode(text.str());
  ASSERT_GT(prompt.size(), static_cast<size_t>(kTokens));
  prompt.resize(kTokens);

  Recorded recorded;
  const auto& pages = recorded.pages;
  EngineOptions options;
  options.horizon = 1;
  options.max_model_len = kTokens + 8;
  const auto device = test::make_test_device();
  Engine engine(*loaded.model, *device, std::make_unique<Recorder>(recorded), options);
  Request request;
  request.prompt = prompt;
  request.max_tokens = 2;
  engine.submit(std::move(request));
  engine.run();
  const KvShape shape = loaded.model->kv_shape();
  ASSERT_EQ(pages.size(), static_cast<size_t>(kTokens / kPageTokens * shape.layers));
  if (const char* name = std::getenv("VERICACHE_KV_FILE"); name != nullptr) {
    std::ofstream out(name, std::ios::binary);
    for (const auto& [place, page] : pages) {
      out.write(reinterpret_cast<const char*>(page.data()), static_cast<std::streamsize>(page.size() * sizeof(bf16)));
    }
  }

  struct Target {
    const char* name;
    KvFormat format;
    double bits;
  };
  const Target targets[] = {{"plane 8", {8, 8, KvCode::plane}, 4.1},
                            {"plane 6", {6, 6, KvCode::plane}, 6.2},
                            {"kivi 8", {8, 8}, 5.3},
                            {"kivi 6", {6, 6}, 7.3},
                            {"kivi 4", {4, 4}, 9.4},
                            {"kivi 3", {3, 3}, 10.6},
                            {"kivi 2", {2, 2}, 11.5},
                            {"quarot 8", {8, 8, KvCode::affine, true}, 4.2},
                            {"quarot 6", {6, 6, KvCode::affine, true}, 5.6},
                            {"quarot 4", {4, 4, KvCode::affine, true}, 7.7},
                            {"quarot 3", {3, 3, KvCode::affine, true}, 8.9},
                            {"quarot 2", {2, 2, KvCode::affine, true}, 10.2},
                            {"fp8", {8, 8, KvCode::fp8}, 5.0},
                            {"int8", {8, 8, KvCode::int8}, 5.3},
                            {"kvquant 4", {4, 4, KvCode::nuq, false, 10}, 6.9},
                            {"kvquant 3", {3, 3, KvCode::nuq, false, 10}, 8.1},
                            {"kvquant 2", {2, 2, KvCode::nuq, false, 10}, 9.4},
                            {"lossless", {4, 4}, 11.5}};
  const double all_values = static_cast<double>(pages.size()) * static_cast<double>(page_bytes(shape) / sizeof(bf16));
  for (const Target& target : targets) {
    const bool lossless = std::string_view(target.name) == "lossless";
    Measured measured;
    for (const auto& [place, page] : pages) {
      measure(*loaded.kernels, shape, target.format, lossless ? ResidualCode::lossless : ResidualCode::resident, page,
              recorded.rounding.at(place.first), measured);
    }
    const double bits = 8 * static_cast<double>(measured.bytes) / all_values;
    fmt::print("{:10} {:6.2f} bits a value on the wire; entropy of the residual {:5.2f} keys, {:5.2f} values; {}\n",
               target.name, bits, entropy(measured.keys), entropy(measured.values),
               lossless ? fmt::format("of the exponents {:.2f}", entropy(measured.exponents)) : "");
    EXPECT_LE(bits, target.bits) << target.name;
    EXPECT_GT(bits, lossless ? 8 + entropy(measured.exponents) - 1 : 2) << target.name;
  }
}

}  // namespace
}  // namespace vericache
