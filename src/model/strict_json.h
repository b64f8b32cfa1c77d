// Text and JSON from files that nobody vouches for: capped size and depth, no duplicate keys, errors that say where.
// Pure functions: any thread.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace vericache {

// `where` names the source in the message of the Error that a malformed, too deep or ambiguous text gives.
nlohmann::json parse_strict_json(std::string_view text, std::string_view where);

// The whole of a regular file of at most `max_bytes`, or an Error with the remedy.
std::string read_text_file(const std::filesystem::path& path, size_t max_bytes);

// Fit for a message: control and non-ASCII bytes escaped, cut after `max_chars`.
std::string printable(std::string_view text, size_t max_chars = 120);

}  // namespace vericache
