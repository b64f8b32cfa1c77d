// check(): a bug or a failed device ends the process with its place and reason. Never fires on user input.
// Any thread may call it.
#pragma once

#include <string_view>

namespace vericache {

[[noreturn]] void check_failed(std::string_view what, const char* file, int line, const char* function);

// The built-ins are what std::source_location is made of; clang 14 lacks the latter.
inline void check(bool holds, std::string_view what, const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                  const char* function = __builtin_FUNCTION()) {
  if (!holds) [[unlikely]] {
    check_failed(what, file, line, function);
  }
}

}  // namespace vericache
