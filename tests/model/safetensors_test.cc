#include "model/safetensors.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "model/temp_directory.h"

namespace vericache {
namespace {

std::string length_prefix(uint64_t n) {
  std::string out(8, '\0');
  for (size_t i = 0; i < 8; ++i) {
    out[i] = static_cast<char>((n >> (8 * i)) & 0xff);
  }
  return out;
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return length_prefix(header.size()) + header + std::string(data_bytes, 'd');
}

TensorMap parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file)), "x.safetensors");
}

#define EXPECT_REFUSED(header, data_bytes, part) EXPECT_ERROR(parse(file_of(header, data_bytes)), part)

TEST(Safetensors, ReadsTensorsScalarsEmptyOnesAndPadding) {
  const std::string file = file_of(
      R"({"__metadata__":{"format":"pt","shape":"[1]"},"b":{"shape":[2,3],"data_offsets":[8,20],"dtype":"BF16"},)"
      R"("a":{"dtype":"F64","shape":[],"data_offsets":[0,8]},"none":{"dtype":"U8","shape":[4,0],"data_offsets":[8,8]}})"
      "   ",
      20);
  const TensorMap tensors = parse(file);
  ASSERT_EQ(tensors.size(), 3u);
  const TensorView& b = tensors.at("b");
  EXPECT_EQ(b.dtype, TensorDtype::bf16);
  EXPECT_EQ(b.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(b.bytes.size(), 12u);
  EXPECT_EQ(reinterpret_cast<const char*>(b.bytes.data()), file.data() + file.size() - 12);
  EXPECT_TRUE(tensors.at("a").shape.empty());
  EXPECT_EQ(tensors.at("a").bytes.size(), 8u);
  EXPECT_TRUE(tensors.at("none").bytes.empty());
  EXPECT_TRUE(parse(file_of("{}", 0)).empty());
}

TEST(Safetensors, RefusesAFalseHeaderLength) {
  EXPECT_ERROR(parse("1234567"), "7 bytes are too few");
  EXPECT_ERROR(parse(""), "0 bytes are too few");
  EXPECT_ERROR(parse(length_prefix(~uint64_t{0}) + "{}"), "more than the 100000000");
  EXPECT_ERROR(parse(length_prefix(uint64_t{1} << 63) + "{}"), "more than the 100000000");
  EXPECT_ERROR(parse(length_prefix(100'000'001) + "{}"), "more than the 100000000");
  EXPECT_ERROR(parse(length_prefix(3) + "{}"), "truncated: a header of 3 bytes is announced, 2 bytes follow");
  EXPECT_ERROR(parse(length_prefix(0)), "does not start with '{'");
  EXPECT_ERROR(parse(length_prefix(3) + " {}"), "does not start with '{'");
  EXPECT_ERROR(parse(length_prefix(1) + "{}"), "not valid JSON");
}

TEST(Safetensors, RefusesAnotherStructure) {
  EXPECT_REFUSED("{\"a\":1}", 0, "a number at the wrong place");
  EXPECT_REFUSED("{\"a\":[]}", 0, "a list at the wrong place");
  EXPECT_REFUSED("{\"a\":null}", 0, "null at the wrong place");
  EXPECT_REFUSED("{\"a\":{\"dtype\":{}}}", 0, "an object at the wrong place");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", 1, "a list at the wrong place");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "a negative number");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", 1, "a fraction");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}})", 1, "beyond 64 bits");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "lacks its dtype, shape or two");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}})", 1, "more than 2 numbers");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1, "more than 8 numbers");
  EXPECT_REFUSED(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, "lacks its dtype");
  EXPECT_REFUSED(R"({"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}})", 1, "unknown dtype \"F4\"");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
                 "repeated field \"dtype\"");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}})", 1, "unknown or repeated field");
  EXPECT_REFUSED(R"({"__metadata__":{"a":1}})", 0, "a number at the wrong place");
  EXPECT_REFUSED(R"({"__metadata__":{},"__metadata__":{}})", 0, "\"__metadata__\" twice");
  EXPECT_REFUSED("{\"a\":\"\xff\"}", 0, "not valid JSON");
  EXPECT_REFUSED("{\"\x1b[2J\":1}", 0, "not valid JSON");
  EXPECT_REFUSED(std::string("{\"a\":") + std::string(1'000'000, '['), 0, "a list at the wrong place");
}

TEST(Safetensors, RefusesLyingOffsets) {
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 3,
                 "truncated: tensor \"a\" ends at byte 4 of the data, the file holds 3");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 5, "1 bytes after the last tensor");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}})", 2, "ends (byte 0) before it begins");
  EXPECT_REFUSED(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "(2) does not fill the 4 bytes");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,2]}})", 2, "does not fill the 2 bytes");
  // Products that come back to the announced size modulo 2^64.
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, "does not fill");
  EXPECT_REFUSED(R"({"a":{"dtype":"F64","shape":[2305843009213693953],"data_offsets":[0,8]}})", 8, "does not fill");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0, "a dimension of");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[18446744073709551615,1]}})", 2, "before it begins");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,18446744073709551615]}})", 2, "truncated");
}

TEST(Safetensors, RefusesOverlapsHolesAndDuplicates) {
  const std::string a = R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  EXPECT_REFUSED("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})", 7,
                 "an overlap before tensor \"b\"");
  EXPECT_REFUSED("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4, "an overlap");
  EXPECT_REFUSED("{" + a + R"(,"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})", 4, "an overlap");
  EXPECT_REFUSED("{" + a + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}})", 9, "a hole before tensor \"b\"");
  EXPECT_REFUSED(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}})", 5, "a hole before tensor \"a\"");
  EXPECT_REFUSED("{" + a + "," + a + "}", 4, "\"a\" appears twice");
}

TEST(Safetensors, EveryPrefixOfAFileIsRefused) {
  const std::string file = file_of(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4);
  for (size_t n = 0; n < file.size(); ++n) {
    EXPECT_THROW(parse(file.substr(0, n)), Error) << n;
  }
}

TEST(Safetensors, OpensAndRefusesFiles) {
  const TempDirectory directory;
  EXPECT_ERROR(SafetensorsFile(directory.path() / "none"), "cannot open");
  EXPECT_ERROR(SafetensorsFile(directory.path()), "is not a regular file");
  EXPECT_ERROR(SafetensorsFile(directory.write("empty", "")), "is empty");
  ASSERT_EQ(::mkfifo((directory.path() / "pipe").c_str(), 0600), 0);
  EXPECT_ERROR(SafetensorsFile(directory.path() / "pipe"), "is not a regular file");
  EXPECT_ERROR(SafetensorsFile(directory.write("short", "abc")), "short: 3 bytes are too few");

  const auto path = directory.write("good", file_of(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4));
  SafetensorsFile first(path);
  SafetensorsFile second(std::move(first));
  ASSERT_NE(second.find("a"), nullptr);
  EXPECT_EQ(second.find("b"), nullptr);
  EXPECT_EQ(second.find("a")->bytes[3], std::byte{'d'});
}

TEST(Safetensors, ReleasedPagesReadAgain) {
  const TempDirectory directory;
  std::string data(40'000, '\0');
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<char>(i * 7);
  }
  const auto path = directory.path() / "x";
  const auto bytes = std::as_bytes(std::span(data));
  write_safetensors(path, {{"a", {TensorDtype::u8, {10'000}, bytes.subspan(0, 10'000)}},
                           {"b", {TensorDtype::u8, {30'000}, bytes.subspan(10'000)}}});
  const SafetensorsFile file(path);
  for (const auto& [name, tensor] : file.tensors()) {
    file.release(tensor);
  }
  EXPECT_EQ(std::memcmp(file.find("b")->bytes.data(), data.data() + 10'000, 30'000), 0);
}

TEST(Safetensors, WriterRefusesWhatItCannotWrite) {
  EXPECT_ERROR(write_safetensors("/nowhere/at/all/x.safetensors", {}), "cannot write /nowhere");
}

TEST(Safetensors, WhatIsWrittenIsReadBack) {
  const TempDirectory directory;
  const auto path = directory.path() / "x.safetensors";
  const bool held = rc::check("what is written is read back", [&] {
    const auto count = *rc::gen::inRange<size_t>(0, 6);
    std::vector<std::string> contents(count);
    TensorMap tensors;
    for (size_t i = 0; i < count; ++i) {
      const auto dtype = static_cast<TensorDtype>(*rc::gen::inRange(0, 15));
      const auto shape = *rc::gen::container<std::vector<int64_t>>(3, rc::gen::inRange<int64_t>(0, 5));
      const auto elements = static_cast<size_t>(shape[0] * shape[1] * shape[2]);
      contents[i].assign(elements * dtype_bytes(dtype), static_cast<char>('a' + i));
      const std::string name = *rc::gen::element<std::string>("w", "\"q\"", "\xc3\xa9", "") + std::to_string(i);
      tensors[name] = {dtype, shape, std::as_bytes(std::span(contents[i]))};
    }
    write_safetensors(path, tensors);
    const SafetensorsFile file(path);
    RC_ASSERT(file.tensors().size() == tensors.size());
    for (const auto& [name, tensor] : tensors) {
      const TensorView* read = file.find(name);
      RC_ASSERT(read != nullptr && read->dtype == tensor.dtype && read->shape == tensor.shape);
      RC_ASSERT(std::equal(read->bytes.begin(), read->bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
      RC_ASSERT(reinterpret_cast<uintptr_t>(read->bytes.data()) % dtype_bytes(read->dtype) == 0);
    }
  });
  EXPECT_TRUE(held);
}

}  // namespace
}  // namespace vericache
