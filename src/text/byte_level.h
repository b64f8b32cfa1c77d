// The byte-level alphabet of GPT-2 (Radford et al. 2019): every byte as a printable code point. Pure functions, any
// thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace vericache {

// Code points of the alphabet are below this.
inline constexpr char32_t kByteLevelEnd = 0x144;

// The code point that stands for each byte.
const std::array<char32_t, 256>& byte_level_alphabet();

void append_byte_level(std::string_view bytes, std::string& out);
size_t byte_level_length(std::string_view bytes);  // bytes that append_byte_level() appends

// Appends the bytes that `token` stands for; a token with a character outside the alphabet stands for its own UTF-8.
void append_bytes_of(std::string_view token, std::string& out);

}  // namespace vericache
