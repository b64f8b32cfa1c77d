// The small tokenizers of tests/data/text, made by tools/make_tokenizer_vectors.py.
// One thread, the test's.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/error.h"
#include "text/tokenizer.h"

namespace vericache {

inline std::string read_text_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error("{}: cannot be read", path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

inline const std::vector<std::string>& tokenizer_families() {
  static const std::vector<std::string> names = {"gpt2",        "gpt2_prefix",     "llama3",          "qwen2",
                                                 "mixed",       "digits",          "gpt2_seams",      "llama3_seams",
                                                 "qwen2_seams", "cased_seams",     "digits_seams",    "metaspace_seams",
                                                 "llama2",      "metaspace_first", "metaspace_always"};
  return names;
}

inline std::filesystem::path text_data(const std::string& file) {
  return std::filesystem::path(VERICACHE_TEST_DATA) / "text" / file;
}

inline Tokenizer family_tokenizer(const std::string& name) {
  return Tokenizer::parse(read_text_file(text_data(name + ".json")));
}

}  // namespace vericache
