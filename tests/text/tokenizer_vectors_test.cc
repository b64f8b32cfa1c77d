#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "text/families.h"
#include "text/tokenizer.h"

namespace vericache {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<TokenId>;

class TokenizerVectors : public testing::TestWithParam<std::string> {};

TEST_P(TokenizerVectors, AgreeWithTheTokenizersPackage) {
  const Tokenizer tokenizer = family_tokenizer(GetParam());
  const Json cases = Json::parse(read_text_file(text_data(GetParam() + ".cases.json")));
  ASSERT_GE(cases["encode"].size(), 60u);
  ASSERT_GE(cases["decode"].size(), 30u);
  for (const Json& one : cases["encode"]) {
    const std::string text = one[0].get<std::string>();
    const Ids ids = one[1].get<Ids>();
    const Ids special = one[2].is_null() ? ids : one[2].get<Ids>();
    EXPECT_EQ(tokenizer.encode(text), ids) << text;
    EXPECT_EQ(tokenizer.encode(text, true), special) << text;
    const std::string decoded = one[3].is_null() ? text : one[3].get<std::string>();
    EXPECT_EQ(tokenizer.decode(special), decoded) << text;
    EXPECT_EQ(tokenizer.decode(special, true), one[4].is_null() ? decoded : one[4].get<std::string>()) << text;
  }
  for (const Json& one : cases["decode"]) {
    EXPECT_EQ(tokenizer.decode(one[0].get<Ids>()), one[1].get<std::string>()) << one[0].dump();
  }
}

INSTANTIATE_TEST_SUITE_P(Families, TokenizerVectors, testing::ValuesIn(tokenizer_families()),
                         [](const auto& info) { return info.param; });

TEST(BundledTokenizer, AgreesWithItsGoldenCases) {
  const std::filesystem::path model = std::filesystem::path(VERICACHE_MODELS) / "vericode-26m";
  ASSERT_TRUE(std::filesystem::exists(model / "tokenizer.json")) << model << " is missing: the build unpacks it";
  const Tokenizer tokenizer = Tokenizer::load(model);
  EXPECT_EQ(tokenizer.vocab_size(), 8192);
  EXPECT_EQ(tokenizer.kind(), "byte-level BPE");
  EXPECT_EQ(tokenizer.token_id("<|end|>"), 5);
  EXPECT_TRUE(tokenizer.is_special(5));
  EXPECT_FALSE(tokenizer.is_special(500));
  const Json cases = Json::parse(read_text_file(model / "golden" / "tokenizer_cases.json"));
  ASSERT_GE(cases.size(), 12u);
  for (const Json& one : cases) {
    const std::string text = one["text"].get<std::string>();
    EXPECT_EQ(tokenizer.encode(text), one["ids"].get<Ids>()) << text;
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
  const Json golden = Json::parse(read_text_file(model / "golden" / "golden.json"));
  for (const Json& one : golden) {
    EXPECT_EQ(tokenizer.encode(one["prompt"].get<std::string>()), one["prompt_ids"].get<Ids>()) << one["name"];
  }
}

}  // namespace
}  // namespace vericache
