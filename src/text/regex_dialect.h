// Translation of the regular expressions of tokenizer.json (Oniguruma's dialect) to PCRE2.
// Pure function, any thread.
#pragma once

#include <string>
#include <string_view>

namespace vericache {

// Takes the part of Oniguruma that PCRE2 can match the same way and throws Error, naming the construct and `where` it
// stands, for the rest. Unicode properties become those of unicode.h.
std::string to_pcre2(std::string_view pattern, std::string_view where);

}  // namespace vericache
