#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "text/families.h"

namespace vericache {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<TokenId>;

Json family_json(const std::string& name) {
  return Json::parse(read_text_file(text_data(name + ".json")));
}

// The message of the Error that parsing `json` ends in; empty when it is taken.
std::string refusal(const Json& json) {
  try {
    Tokenizer::parse(json.dump());
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

struct Refusal {
  const char* family;
  std::function<void(Json&)> change;
  std::vector<const char*> said;  // all of it in the message
};

std::vector<Refusal> refusals() {
  return {
      {"gpt2", [](Json& j) { j["model"]["type"] = "Unigram"; }, {"Unigram", "supported: BPE"}},
      {"gpt2", [](Json& j) { j["model"]["dropout"] = 0.1; }, {"dropout", "0.1"}},
      {"gpt2", [](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }, {"end_of_word_suffix", "</w>"}},
      {"gpt2", [](Json& j) { j["model"]["merges"][3] = "a b c"; }, {"merges[3]", "a b c"}},
      {"gpt2", [](Json& j) { j["model"]["merges"][3] = 7; }, {"merges[3]"}},
      {"gpt2", [](Json& j) { j["model"]["merges"][3] = "zzz b"; }, {"merges[3]", "zzz"}},
      {"gpt2", [](Json& j) { j["model"]["vocab"]["!"] = 1; }, {"the same id 1"}},
      {"gpt2", [](Json& j) { j["model"]["vocab"]["!"] = -1; }, {"model.vocab", "-1"}},
      {"gpt2", [](Json& j) { j["model"]["vocab"]["!"] = 4294967296; }, {"model.vocab", "4294967296"}},
      {"gpt2", [](Json& j) { j["model"]["vocab"]["!"] = 2000000000; }, {"ids from 0 to"}},
      {"gpt2", [](Json& j) { j["model"]["vocab"]["!"] = "x"; }, {"model.vocab"}},
      {"gpt2", [](Json& j) { j.erase("model"); }, {"'model' is missing"}},
      {"gpt2", [](Json& j) { j["version"] = "2.0"; }, {"version", "2.0"}},
      {"gpt2",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Whitespace"}};
       },
       {"Whitespace", "Metaspace, Digits"}},
      {"gpt2",
       [](Json& j) {
         j["normalizer"] = {{"type", "Lowercase"}};
       },
       {"Lowercase", "NFC, Prepend, Replace"}},
      {"gpt2",
       [](Json& j) {
         j["decoder"] = {{"type", "WordPiece"}};
       },
       {"WordPiece", "ByteFallback, Fuse, Strip"}},
      {"gpt2",
       [](Json& j) {
         j["post_processor"] = {{"type", "BertProcessing"}};
       },
       {"BertProcessing", "TemplateProcessing"}},
      {"gpt2", [](Json& j) { j["added_tokens"][2]["id"] = 5000; }, {"added_tokens[2]", "5000"}},
      {"gpt2", [](Json& j) { j["added_tokens"][1]["content"] = "<|end|>"; }, {"<|end|>"}},
      {"gpt2", [](Json& j) { j["added_tokens"][1]["lstrip"] = 1; }, {"added_tokens[1]", "lstrip"}},
      {"llama2",
       [](Json& j) { std::swap(j["decoder"]["decoders"][1], j["decoder"]["decoders"][2]); },
       {"ByteFallback"}},
      {"llama2",
       [](Json& j) {
         j["decoder"]["decoders"].push_back({{"type", "ByteLevel"}});
       },
       {"ByteLevel"}},
      {"llama2", [](Json& j) { j["post_processor"]["special_tokens"]["<s>"]["ids"][0] = 99999; }, {"<s>", "99999"}},
      {"llama2", [](Json& j) { j["post_processor"]["single"].erase(1); }, {"leaves the text out"}},
      {"metaspace_first",
       [](Json& j) { j["pre_tokenizer"]["prepend_scheme"] = "last"; },
       {"last", "always, first, never"}},
      {"metaspace_first", [](Json& j) { j["pre_tokenizer"]["replacement"] = "ab"; }, {"replacement"}},
  };
}

TEST(Tokenizer, RefusesByNameWhatItDoesNotSupport) {
  for (const Refusal& refused : refusals()) {
    Json json = family_json(refused.family);
    ASSERT_EQ(refusal(json), "");
    refused.change(json);
    const std::string message = refusal(json);
    for (const char* part : refused.said) {
      EXPECT_NE(message.find(part), std::string::npos) << "'" << part << "' is not in: " << message;
    }
  }
}

TEST(Tokenizer, RefusesRegularExpressionsThatPcre2WouldReadDifferently) {
  for (const char* regex : {"a$",    "^a",  "\\bx",  "\\w+",   "[a&&b]",     "[[:alpha:]]", "a{2}+",
                            "a{,3}", "\\h", "(?x)a", "(?i)a",  "\\p{Greek}", "(?i:ss)",     "(?i:\\p{Lu})",
                            "(a",    "[a",  "a\\",   "(*UTF)", "\\1(a)",     "[\\P{L}]"}) {
    Json json = family_json("llama3");
    json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex;
    EXPECT_NE(refusal(json).find("pre_tokenizer.pretokenizers[0]"), std::string::npos)
        << regex << ": " << refusal(json);
  }
}

TEST(Tokenizer, RefusesBrokenJson) {
  for (const char* text :
       {"", "{", "[]", "null", "{\"model\": 3}", "{\"model\": {\"vocab\": {\"\\ud800\": 1}}}", "\xff"}) {
    EXPECT_THROW(Tokenizer::parse(text), Error) << text;
  }
  Json nested = {{"type", "NFC"}};
  for (int i = 0; i < 20; ++i) nested = {{"type", "Sequence"}, {"normalizers", {nested}}};
  Json json = family_json("gpt2");
  json["normalizer"] = nested;
  EXPECT_NE(refusal(json).find("Sequences inside each other"), std::string::npos);
}

TEST(Tokenizer, StepsThatMultiplyTheTextEndInAnError) {
  Json normalizing = family_json("llama2");
  Json decoding = normalizing;
  const Json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  for (int i = 0; i < 60; ++i) {
    normalizing["normalizer"]["normalizers"].push_back(twice);
    decoding["decoder"]["decoders"].insert(decoding["decoder"]["decoders"].begin(), twice);
  }
  const Tokenizer decoder = Tokenizer::parse(decoding.dump());
  EXPECT_THROW(Tokenizer::parse(normalizing.dump()).encode("a"), Error);
  EXPECT_THROW(decoder.decode(decoder.encode("a")), Error);
}

TEST(Tokenizer, NamesTheOffsetOfInvalidUtf8) {
  const Tokenizer tokenizer = family_tokenizer("gpt2");
  for (const auto& [text, offset] :
       std::vector<std::pair<std::string, std::string>>{{"abc\xff", "offset 3"},
                                                        {"é\xc3", "offset 2"},
                                                        {"\xed\xa0\x80", "offset 0"},
                                                        {"a\xc0\xaf", "offset 1"},
                                                        {"a\xf4\x90\x80\x80", "offset 1"}}) {
    try {
      tokenizer.encode(text);
      ADD_FAILURE() << "taken: " << offset;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(offset), std::string::npos) << error.what();
    }
  }
}

TEST(Tokenizer, TakesMergesInBothForms) {
  Json strings = family_json("gpt2");
  Json pairs = strings;
  for (Json& merge : pairs["model"]["merges"]) {
    const std::string line = merge.get<std::string>();
    const size_t space = line.find(' ');
    merge = Json::array({line.substr(0, space), line.substr(space + 1)});
  }
  const std::string text = "The quick brown fox doesn't jump";
  EXPECT_EQ(Tokenizer::parse(strings.dump()).encode(text), Tokenizer::parse(pairs.dump()).encode(text));
}

// A token that lies wholly in the white space that the one before it has taken is gone.
TEST(Tokenizer, StrippingDoesNotTakeTheSameTextTwice) {
  Json json = family_json("gpt2");
  TokenId right = 0;
  for (Json& token : json["added_tokens"]) {
    if (token["content"] == "\t\t") token["lstrip"] = true;
    if (token["content"] == "<|right|>") right = token["id"].get<TokenId>();
  }
  const Tokenizer tokenizer = Tokenizer::parse(json.dump());
  const TokenId x = tokenizer.token_id("x").value();
  EXPECT_EQ(tokenizer.encode("<|right|>\t\tx"), Ids({right, x}));
  EXPECT_EQ(tokenizer.encode("<|right|> \t\t\t\tx"), Ids({right, x}));
}

// Long runs are where a quadratic merge, a backtracking limit or an exhausted stack would show. A second is generous
// for a megabyte; quadratic work takes hours.
TEST(Tokenizer, LongRunsTakeLinearTime) {
  for (const std::string& name : tokenizer_families()) {
    const Tokenizer tokenizer = family_tokenizer(name);
    const auto start = std::chrono::steady_clock::now();
    for (const std::string unit :
         {" ", "a", "\n", "1", "\xCC\x81", "\xCC\x81\xCC\xA3", " \n", "word ", "\t\t", "<|end|", "'s"}) {
      std::string text;
      while (text.size() < 250'000) text += unit;
      const Ids ids = tokenizer.encode(text + "x");
      EXPECT_FALSE(ids.empty());
      EXPECT_LE(ids.size(), 2 * text.size() + 3);  // every byte may begin a word and get a space
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    EXPECT_LT(elapsed.count(), 30) << name;
  }
}

TEST(Tokenizer, AMegabyteOfSpacesIsTakenByEveryPattern) {
  for (const char* name : {"gpt2", "llama3", "qwen2"}) {
    const Tokenizer tokenizer = family_tokenizer(name);
    const std::string text = std::string(1 << 20, ' ') + "x";
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << name;
  }
}

TEST(Tokenizer, ThreadsShareOneTokenizer) {
  const Tokenizer tokenizer = family_tokenizer("qwen2");
  const std::string text = "Some text, 123 cafe\xCC\x81 and   <|end|> spaces; it's shared.\n";
  const Ids expected = tokenizer.encode(text);
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  threads.reserve(wrong.size());
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) wrong[t] += tokenizer.encode(text) != expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

class TokenizerFolder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              ("vericache-tokenizer-" + std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()));
    std::filesystem::create_directory(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write(const char* file, const std::string& text) { std::ofstream(folder_ / file, std::ios::binary) << text; }

  std::filesystem::path folder_;
};

TEST_F(TokenizerFolder, ConfigDecidesOverTheBeginningAndEndTokens) {
  write("tokenizer.json", read_text_file(text_data("llama2.json")));
  EXPECT_EQ(Tokenizer::load(folder_).encode("", true), Ids({1}));
  write("tokenizer_config.json", R"({"add_bos_token": false, "bos_token": "<s>"})");
  EXPECT_EQ(Tokenizer::load(folder_).encode("", true), Ids());
  write("tokenizer_config.json",
        R"({"add_bos_token": true, "bos_token": {"content": "<s>"}, "add_eos_token": true, "eos_token": "</s>"})");
  EXPECT_EQ(Tokenizer::load(folder_).encode("", true), Ids({1, 2}));
  EXPECT_EQ(Tokenizer::load(folder_).encode("", false), Ids());
  write("tokenizer_config.json", R"({"add_bos_token": true, "bos_token": null})");
  EXPECT_THROW(Tokenizer::load(folder_), Error);
  write("tokenizer_config.json", R"({"add_bos_token": true, "bos_token": "<nowhere>"})");
  EXPECT_THROW(Tokenizer::load(folder_), Error);
}

TEST_F(TokenizerFolder, SaysWhatToDoWithoutATokenizer) {
  try {
    Tokenizer::load(folder_);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("save_pretrained"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find(folder_.string()), std::string::npos);
  }
}

}  // namespace
}  // namespace vericache
