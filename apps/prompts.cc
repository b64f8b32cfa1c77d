#include "prompts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "model/strict_json.h"
#include "text/utf8.h"

namespace vericache {
namespace {

constexpr size_t kMostPromptBytes = size_t{1} << 28;

void require_utf8(std::string_view text, std::string_view source) {
  const size_t at = find_invalid_utf8(text);
  if (at != std::string_view::npos) {
    throw Error(
        "{} is not UTF-8: byte {} (0x{:02x}) is out of place; convert it first, as with: iconv -f LATIN1 -t UTF-8",
        source, at, static_cast<unsigned char>(text[at]));
  }
}

// "-" is stdin.
std::string source_name(const std::string& path) {
  return path == "-" ? "the prompt on stdin" : path;
}

std::string read_all(const std::string& path) {
  const auto close = [](std::FILE* file) { return file == stdin ? 0 : std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(path == "-" ? stdin : std::fopen(path.c_str(), "rb"), close);
  if (file == nullptr) {
    throw Error("{} cannot be opened: {}; give a file that can be read", path, std::strerror(errno));
  }
  std::string text;
  std::array<char, 65536> block;
  while (const size_t bytes = std::fread(block.data(), 1, block.size(), file.get())) {
    if (text.size() + bytes > kMostPromptBytes) {
      throw Error("{} is longer than {} MB: shorten it", source_name(path), kMostPromptBytes >> 20);
    }
    text.append(block.data(), bytes);
  }
  if (std::ferror(file.get()) != 0) {
    throw Error("{} cannot be read: {}; give a plain file", source_name(path), std::strerror(errno));
  }
  return text;
}

std::vector<TokenId> ids_from_json(const nlohmann::json& list, int vocabulary, const std::string& where) {
  if (!list.is_array() || list.empty()) {
    throw Error("{}: expected a JSON list with at least one token id", where);
  }
  std::vector<TokenId> ids;
  ids.reserve(list.size());
  for (const nlohmann::json& id : list) {
    if (!id.is_number_integer() || id < 0 || id >= vocabulary) {
      throw Error("{}: entry {} is no token id of this model: ids are integers from 0 to {}", where, ids.size(),
                  vocabulary - 1);
    }
    ids.push_back(id.get<TokenId>());
  }
  return ids;
}

}  // namespace

std::string read_prompt_file(const std::string& path) {
  std::string text = read_all(path);
  const std::string source = source_name(path);
  if (text.empty()) {
    throw Error("{} is empty: a prompt needs at least one character", source);
  }
  require_utf8(text, source);
  return text;
}

std::string read_prompt(const PromptFlags& flags) {
  if (!flags.text_given) {
    return read_prompt_file(flags.file.empty() ? "-" : flags.file);
  }
  if (flags.text.empty()) {
    throw Error("--prompt is empty: a prompt needs at least one character");
  }
  require_utf8(flags.text, "--prompt");
  return flags.text;
}

std::vector<TokenId> encode_prompt(const Tokenizer& tokenizer, std::string_view text, std::string_view source) {
  std::vector<TokenId> ids = tokenizer.encode(text, true);
  if (ids.empty()) {
    throw Error("{} gives no tokens: a prompt needs at least one", source);
  }
  return ids;
}

std::vector<std::vector<TokenId>> read_prompt_lines(const std::string& path, const Tokenizer& tokenizer,
                                                    int vocabulary) {
  const std::string text = read_all(path);
  std::vector<std::vector<TokenId>> prompts;
  int line_number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line(text.data() + begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    const std::string where = fmt::format("{} line {}", path, line_number);
    const nlohmann::json object = parse_strict_json(line, where);
    if (object.is_object() && object.contains("ids")) {
      prompts.push_back(ids_from_json(object["ids"], vocabulary, where + " \"ids\""));
    } else if (object.is_object() && object.contains("prompt") && object["prompt"].is_string()) {
      prompts.push_back(encode_prompt(tokenizer, object["prompt"].get_ref<const std::string&>(), where));
    } else {
      throw Error("{}: expected {{\"prompt\": \"...\"}} or {{\"ids\": [...]}}", where);
    }
  }
  if (prompts.empty()) {
    throw Error("{} holds no prompts: expected one {{\"prompt\": \"...\"}} a line", path);
  }
  return prompts;
}

std::vector<TokenId> read_ids_file(const std::string& path, int vocabulary) {
  return ids_from_json(parse_strict_json(read_all(path), path), vocabulary, path);
}

double distinct_8gram_share(std::span<const std::vector<TokenId>> texts) {
  constexpr size_t kLength = 8;
  std::set<std::array<TokenId, kLength>> distinct;
  size_t all = 0;
  for (const std::vector<TokenId>& text : texts) {
    for (size_t begin = 0; begin + kLength <= text.size(); ++begin, ++all) {
      std::array<TokenId, kLength> gram;
      std::copy_n(text.begin() + static_cast<std::ptrdiff_t>(begin), kLength, gram.begin());
      distinct.insert(gram);
    }
  }
  return all == 0 ? 1.0 : static_cast<double>(distinct.size()) / static_cast<double>(all);
}

}  // namespace vericache
