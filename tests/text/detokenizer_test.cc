#include "text/detokenizer.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include "text/families.h"
#include "text/utf8.h"

namespace vericache {
namespace {

bool is_utf8(const std::string& text) {
  return find_invalid_utf8(text) == std::string_view::npos;
}

struct Streamed {
  std::string text;
  bool always_utf8 = true;
};

Streamed stream(Detokenizer& detokenizer, const std::vector<TokenId>& ids) {
  Streamed result;
  const auto take = [&](const std::string& part) {
    result.always_utf8 &= is_utf8(part);
    result.text += part;
  };
  for (const TokenId id : ids) take(detokenizer.push(id));
  take(detokenizer.flush());
  return result;
}

// Half of the ids are those of single bytes, so that characters fall apart and come together.
rc::Gen<std::vector<TokenId>> some_ids(int vocabulary) {
  return rc::gen::container<std::vector<TokenId>>(
      rc::gen::weightedOneOf<TokenId>({{1, rc::gen::inRange(-2, vocabulary + 2)}, {1, rc::gen::inRange(0, 260)}}));
}

class DetokenizerProperties : public testing::TestWithParam<std::string> {};

TEST_P(DetokenizerProperties, PiecesMakeUpWhatDecodeGives) {
  const Tokenizer tokenizer = family_tokenizer(GetParam());
  for (const bool skip_special : {false, true}) {
    Detokenizer detokenizer(tokenizer, skip_special);  // used again and again: flush() starts afresh
    EXPECT_TRUE(rc::check([&] {
      const std::vector<TokenId> ids = *some_ids(tokenizer.vocab_size());
      const Streamed streamed = stream(detokenizer, ids);
      RC_ASSERT(streamed.text == tokenizer.decode(ids, skip_special));
      RC_ASSERT(streamed.always_utf8);
    }));
  }
}

// Random ids are mostly broken text; this is text, cut where its tokens are cut.
TEST_P(DetokenizerProperties, StreamsRealText) {
  const Tokenizer tokenizer = family_tokenizer(GetParam());
  Detokenizer detokenizer(tokenizer);
  for (const char* text : {"naïve café Ωμέγα 日本語テキスト 🙂👍🏽 end", " leading", "  two", "",
                           "\xF0\x9F\x99\x82"}) {
    const std::vector<TokenId> ids = tokenizer.encode(text);
    const Streamed streamed = stream(detokenizer, ids);
    EXPECT_EQ(streamed.text, tokenizer.decode(ids));
    EXPECT_TRUE(streamed.always_utf8);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, DetokenizerProperties, testing::ValuesIn(tokenizer_families()),
                         [](const auto& info) { return info.param; });

TEST(Detokenizer, HoldsBackACharacterUntilItIsWhole) {
  const Tokenizer tokenizer = family_tokenizer("gpt2");
  // U+1F642 is F0 9F 99 82, in the byte-level alphabet "ð", "Ł", "Ļ", "Ĥ".
  std::vector<TokenId> bytes;
  for (const char* byte : {"ð", "Ł", "Ļ", "Ĥ"}) bytes.push_back(tokenizer.token_id(byte).value());
  Detokenizer detokenizer(tokenizer);
  EXPECT_EQ(detokenizer.push(bytes[0]), "");
  EXPECT_EQ(detokenizer.push(bytes[1]), "");
  EXPECT_EQ(detokenizer.push(bytes[2]), "");
  EXPECT_EQ(detokenizer.push(bytes[3]), "\xF0\x9F\x99\x82");
  EXPECT_EQ(detokenizer.push(bytes[0]), "");
  EXPECT_EQ(detokenizer.push(tokenizer.token_id("a").value()), std::string(kReplacementCharacter) + "a");
  EXPECT_EQ(detokenizer.push(bytes[0]), "");
  EXPECT_EQ(detokenizer.push(bytes[1]), "");
  EXPECT_EQ(detokenizer.flush(), kReplacementCharacter);
}

TEST(Detokenizer, ByteFallbackWaitsForTheEndOfTheRun) {
  const Tokenizer tokenizer = family_tokenizer("llama2");
  const auto byte = [&](const char* name) { return tokenizer.token_id(name).value(); };
  const std::string replacement(kReplacementCharacter);
  Detokenizer detokenizer(tokenizer);
  EXPECT_EQ(detokenizer.push(tokenizer.token_id("▁a").value()), "a");
  EXPECT_EQ(detokenizer.push(byte("<0xC3>")), "");
  EXPECT_EQ(detokenizer.push(byte("<0xA9>")), "");
  EXPECT_EQ(detokenizer.push(byte("<0xC3>")), "");  // makes the whole run invalid
  EXPECT_EQ(detokenizer.push(tokenizer.token_id("▁a").value()), replacement + replacement + replacement + " a");
  EXPECT_EQ(detokenizer.push(byte("<0xC3>")), "");
  EXPECT_EQ(detokenizer.push(byte("<0xA9>")), "");
  EXPECT_EQ(detokenizer.flush(), "é");
}

RC_GTEST_PROP(Utf8Stream, DoesNotDependOnHowTheBytesAreCut, (const std::vector<std::string>& random_parts)) {
  // Bytes that begin and continue characters are frequent.
  const std::string alphabet = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x99\x82\xED\xA0\xF4\x90\xC0\xFF";
  std::string whole, pieces, at_once;
  Utf8Stream cut, uncut;
  for (std::string part : random_parts) {
    for (char& c : part) c = alphabet[static_cast<uint8_t>(c) % alphabet.size()];
    whole += part;
    cut.push(part, pieces);
    RC_ASSERT(is_utf8(pieces));
  }
  cut.flush(pieces);
  uncut.push(whole, at_once);
  uncut.flush(at_once);
  RC_ASSERT(pieces == at_once);
  if (is_utf8(whole)) RC_ASSERT(pieces == whole);
}

}  // namespace
}  // namespace vericache
