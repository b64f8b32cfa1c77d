// Encodes the strings of a file with one tokenizer, for tools/make_tokenizer_vectors.py, which compares the answers
// with those of the tokenizers package. Input, for each string: its length in bytes (uint32, little endian) and its
// bytes. Output, for each: the number of ids (uint32), the ids (int32); the same with special tokens; then the decoded
// text of the ids with and without special tokens skipped, each as its length (uint32) and its bytes.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "text/tokenizer.h"

namespace {

using vericache::Error;
using vericache::TokenId;
using vericache::Tokenizer;

std::string read_all(const char* path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error("{}: cannot be read", path);
  return {std::istreambuf_iterator<char>(in), {}};
}

uint32_t take_number(std::string_view& rest) {
  if (rest.size() < 4) throw Error("the questions end in the middle of a number");
  uint32_t number = 0;
  for (int i = 3; i >= 0; --i) number = number << 8 | static_cast<uint8_t>(rest[i]);
  rest.remove_prefix(4);
  return number;
}

uint32_t take_length(std::string_view& rest, size_t item_bytes) {
  const uint32_t length = take_number(rest);
  if (length > rest.size() / item_bytes) throw Error("{} items are more than the rest of the file holds", length);
  return length;
}

class Answers {
 public:
  explicit Answers(const char* path) : out_(path, std::ios::binary) {}
  void number(uint32_t value) {
    for (int i = 0; i < 4; ++i) out_.put(static_cast<char>(value >> (8 * i)));
  }
  void ids(const std::vector<TokenId>& values) {
    number(static_cast<uint32_t>(values.size()));
    for (const TokenId id : values) number(static_cast<uint32_t>(id));
  }
  void text(std::string_view value) {
    number(static_cast<uint32_t>(value.size()));
    out_.write(value.data(), static_cast<std::streamsize>(value.size()));
  }
  bool good() { return static_cast<bool>(out_.flush()); }

 private:
  std::ofstream out_;
};

void encode_all(const Tokenizer& tokenizer, std::string_view rest, Answers& out) {
  while (!rest.empty()) {
    const uint32_t length = take_length(rest, 1);
    const std::string_view text = rest.substr(0, length);
    rest.remove_prefix(length);
    out.ids(tokenizer.encode(text));
    const std::vector<TokenId> with_special = tokenizer.encode(text, true);
    out.ids(with_special);
    out.text(tokenizer.decode(with_special));
    out.text(tokenizer.decode(with_special, true));
  }
}

void decode_all(const Tokenizer& tokenizer, std::string_view rest, Answers& out) {
  while (!rest.empty()) {
    const uint32_t count = take_length(rest, 4);
    std::vector<TokenId> ids;
    for (uint32_t i = 0; i < count; ++i) ids.push_back(static_cast<TokenId>(take_number(rest)));
    out.text(tokenizer.decode(ids));
    out.text(tokenizer.decode(ids, true));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view mode = argc == 5 ? argv[2] : "";
  if (mode != "encode" && mode != "decode") {
    std::fputs("usage: tokenizer_compare TOKENIZER_JSON encode|decode QUESTIONS ANSWERS\n", stderr);
    return 2;
  }
  try {
    const Tokenizer tokenizer = Tokenizer::parse(read_all(argv[1]));
    const std::string questions = read_all(argv[3]);
    Answers answers(argv[4]);
    (mode == "encode" ? encode_all : decode_all)(tokenizer, questions, answers);
    if (!answers.good()) throw Error("{}: cannot be written", argv[4]);
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
