#include "model/checkpoint.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "model/temp_directory.h"

namespace vericache {
namespace {

template <typename T>
TensorView view(TensorDtype dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
  return {dtype, std::move(shape), std::as_bytes(std::span(values))};
}

const std::vector<uint16_t> kHalves = {0x3c00, 0xc000, 0x0001, 0x3555, 0x7bff, 0x8000};  // f16
const std::vector<uint16_t> kBrains = {0x3f80, 0xc000, 0x0001, 0x3eab, 0x7f7f, 0x8000};  // bf16
const std::vector<float> kFloats = {1.0f, -2.5f, 1e-40f, 3.14159265f, -0.0f, 65536.5f};

std::vector<float> rows(const TensorView& tensor, int64_t first, int64_t count, size_t elements) {
  std::vector<float> out(elements);
  read_rows(tensor, first, count, std::span<float>(out));
  return out;
}

std::vector<uint16_t> bf16_rows(const TensorView& tensor, int64_t first, int64_t count, size_t elements) {
  std::vector<bf16> out(elements);
  read_rows(tensor, first, count, std::span<bf16>(out));
  std::vector<uint16_t> bits;
  for (const bf16 x : out) {
    bits.push_back(x.bits);
  }
  return bits;
}

TEST(ReadRows, ConvertsEveryWeightDtype) {
  const TensorView half = view(TensorDtype::f16, {3, 2}, kHalves);
  EXPECT_EQ(rows(half, 0, 3, 6), (std::vector<float>{1.0f, -2.0f, 0x1p-24f, 0x1.554p-2f, 65504.0f, -0.0f}));
  EXPECT_EQ(bf16_rows(half, 1, 2, 4), (std::vector<uint16_t>{0x3380, 0x3eab, 0x4780, 0x8000}));

  const TensorView brain = view(TensorDtype::bf16, {2, 3}, kBrains);
  EXPECT_EQ(bf16_rows(brain, 0, 2, 6), kBrains);
  EXPECT_EQ(rows(brain, 1, 1, 3)[0], std::bit_cast<float>(0x3eab0000u));

  const TensorView single = view(TensorDtype::f32, {6}, kFloats);
  EXPECT_EQ(rows(single, 1, 4, 4), (std::vector<float>{-2.5f, 1e-40f, 3.14159265f, -0.0f}));
  EXPECT_EQ(bf16_rows(single, 3, 3, 3), (std::vector<uint16_t>{0x4049, 0x8000, 0x4780}));
  EXPECT_EQ(rows(view(TensorDtype::f32, {}, std::vector<float>{7.0f}), 0, 1, 1)[0], 7.0f);
}

TEST(ReadRows, RoundsToNearestEven) {
  const std::vector<float> values = {std::bit_cast<float>(0x3f808000u), std::bit_cast<float>(0x3f818000u),
                                     std::bit_cast<float>(0x3f808001u), std::bit_cast<float>(0x3f807fffu),
                                     std::bit_cast<float>(0x7f7fffffu), std::bit_cast<float>(0x00008000u),
                                     std::bit_cast<float>(0x00018000u)};
  EXPECT_EQ(bf16_rows(view(TensorDtype::f32, {7}, values), 0, 7, 7),
            (std::vector<uint16_t>{0x3f80, 0x3f82, 0x3f81, 0x3f80, 0x7f80, 0x0000, 0x0002}));
}

TEST(ReadRows, ReadsUnalignedData) {
  std::vector<std::byte> buffer(1 + kFloats.size() * 4);
  std::memcpy(buffer.data() + 1, kFloats.data(), kFloats.size() * 4);
  EXPECT_EQ(rows({TensorDtype::f32, {6}, std::span(buffer).subspan(1)}, 0, 6, 6), kFloats);
}

TEST(ReadRows, RefusesOtherDtypesAndTakesEmptyRanges) {
  EXPECT_ERROR(rows(view(TensorDtype::i32, {6}, kFloats), 0, 6, 6), "cannot read a tensor of I32");
  EXPECT_TRUE(rows(view(TensorDtype::f32, {6}, kFloats), 6, 0, 0).empty());
  EXPECT_TRUE(bf16_rows(view(TensorDtype::bf16, {0, 3}, std::vector<uint16_t>{}), 0, 0, 0).empty());
}

TEST(ReadRows, HalfPrecisionIsExactForEveryPattern) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = (bits >> 10) & 0x1f;
    const int fraction = bits & 0x3ff;
    const float got = f16_to_float(static_cast<uint16_t>(bits));
    ASSERT_EQ(std::signbit(got), bits >= 0x8000) << bits;
    if (exponent == 0x1f) {
      ASSERT_TRUE(fraction == 0 ? std::isinf(got) : std::isnan(got)) << bits;
      continue;
    }
    const double expected = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    ASSERT_EQ(std::abs(got), expected) << bits;
  }
}

class CheckpointFiles : public testing::Test {
 protected:
  void write_shards() {
    write_safetensors(directory_.path() / "model-1.safetensors", {{"a", view(TensorDtype::f16, {3, 2}, kHalves)},
                                                                  {"unlisted", view(TensorDtype::f32, {6}, kFloats)}});
    write_safetensors(directory_.path() / "model-2.safetensors",
                      {{"b", view(TensorDtype::bf16, {6}, kBrains)}, {"c", view(TensorDtype::f32, {2, 3}, kFloats)}});
  }
  void write_index(std::string_view weight_map) {
    directory_.write("model.safetensors.index.json",
                     std::string(R"({"metadata":{"total_size":48},"weight_map":)") + std::string(weight_map) + "}");
  }
  Checkpoint open() { return Checkpoint(directory_.path()); }

  TempDirectory directory_;
};

constexpr std::string_view kGoodMap =
    R"({"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-2.safetensors"})";

TEST_F(CheckpointFiles, OpensASingleFile) {
  write_safetensors(directory_.path() / "model.safetensors", {{"a", view(TensorDtype::f16, {3, 2}, kHalves)}});
  const Checkpoint checkpoint = open();
  EXPECT_TRUE(checkpoint.has("a"));
  EXPECT_EQ(checkpoint.names(), std::vector<std::string>{"a"});
  EXPECT_EQ(rows(checkpoint.find("a", std::array<int64_t, 2>{3, 2}), 0, 1, 2), (std::vector<float>{1.0f, -2.0f}));
  checkpoint.release("a");
  EXPECT_EQ(checkpoint.file_bytes(), std::filesystem::file_size(directory_.path() / "model.safetensors"));
}

TEST_F(CheckpointFiles, OpensShards) {
  write_shards();
  write_index(kGoodMap);
  const Checkpoint opened = open();
  Checkpoint moved(std::move(const_cast<Checkpoint&>(opened)));
  EXPECT_EQ(moved.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(rows(moved.find("c"), 1, 1, 3), (std::vector<float>{kFloats[3], kFloats[4], kFloats[5]}));
  EXPECT_EQ(bf16_rows(moved.find("b"), 0, 6, 6), kBrains);
  EXPECT_FALSE(moved.has("unlisted"));
}

TEST_F(CheckpointFiles, NamesTheMissingOrMismatchedTensor) {
  write_safetensors(directory_.path() / "model.safetensors",
                    {{"a", view(TensorDtype::f16, {3, 2}, kHalves)}, {"q", view(TensorDtype::i32, {6}, kFloats)}});
  const Checkpoint checkpoint = open();
  EXPECT_ERROR(checkpoint.find("lm_head.weight"), "the tensor \"lm_head.weight\" is missing");
  EXPECT_ERROR(checkpoint.find("a", std::array<int64_t, 2>{2, 3}),
               "\"a\" has shape (3, 2), config.json asks for (2, 3)");
  EXPECT_ERROR(checkpoint.find("a", std::array<int64_t, 1>{3}), "has shape (3, 2)");
  EXPECT_ERROR(checkpoint.find("q", std::array<int64_t, 1>{6}), "\"q\" is I32; supported are BF16, F16 and F32");
}

TEST_F(CheckpointFiles, RefusesAFalseIndex) {
  write_shards();
  write_index(R"({"a":"model-1.safetensors","b":"model-1.safetensors"})");
  EXPECT_ERROR(open(), "\"b\" is in model-1.safetensors, which has no such tensor");
  write_index(R"({"a":"model-3.safetensors"})");
  EXPECT_ERROR(open(), "names the shard model-3.safetensors, which is not there");
  for (const std::string name : {"../model-1.safetensors", "/etc/passwd", "..", ".", "", "x\\\\y", "a\\u0000b"}) {
    write_index("{\"a\":\"" + name + "\"}");
    EXPECT_ERROR(open(), "is not a plain file name");
  }
  write_index(R"({"a":7})");
  EXPECT_ERROR(open(), "is not a file name");
  write_index("{}");
  EXPECT_ERROR(open(), "no \"weight_map\"");
  write_index(R"({"a":"model-1.safetensors","a":"model-2.safetensors"})");
  EXPECT_ERROR(open(), "\"a\" appears twice");
  write_index(std::string(100'000, '['));
  EXPECT_ERROR(open(), "nested deeper");
  directory_.write("model.safetensors.index.json", "[1]");
  EXPECT_ERROR(open(), "no \"weight_map\"");
  directory_.write("model.safetensors.index.json", "{\"weight_map\"");
  EXPECT_ERROR(open(), "not valid JSON");
}

TEST_F(CheckpointFiles, SaysWhatToDoWithoutWeights) {
  EXPECT_ERROR(Checkpoint(directory_.path() / "none"), "is not a directory");
  EXPECT_ERROR(Checkpoint(directory_.write("file", "x")), "is not a directory");
  EXPECT_ERROR(open(), "download the model's weights in safetensors form");
  directory_.write("pytorch_model.bin", "x");
  EXPECT_ERROR(open(), "but pytorch_model.bin: convert it to safetensors");
  directory_.write("model.safetensors", "");
  EXPECT_ERROR(open(), "model.safetensors is empty");
}

}  // namespace
}  // namespace vericache
