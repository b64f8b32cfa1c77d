// Unicode tables: what the characters assigned after the linked libraries' Unicode version are, so that token ids do
// not depend on that version. Constant data, callable from any thread.
#pragma once

#include <string>
#include <string_view>

namespace vericache {

// The inside of a PCRE2 character class for a property of Unicode 16: "L" -> "\p{L}\x{1c89}-\x{1c8a}...".
// Empty for a property that is not in the table (see kSupportedProperties).
std::string property_class(std::string_view property);
inline constexpr std::string_view kSupportedProperties = "L, Lu, Ll, Lt, Lm, Lo, M, N, Nd";

// The same for white space, its complement, the characters of a word (single_word of added tokens), and the numeric
// characters of the Digits pre-tokenizer.
std::string white_space_class();
std::string not_white_space_class();
std::string word_class();
std::string numeric_class();

// Whether NFC leaves this character alone and nothing moves or composes across it because the tables of the tokenizers
// library (Unicode 9) do not know it: marks and letters that came later.
bool unknown_to_nfc(char32_t c);

}  // namespace vericache
