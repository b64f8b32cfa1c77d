// check(): a bug or a failed device ends the process with its place and reason. Never fires on user input.
#pragma once

#include <source_location>
#include <string_view>

namespace vericache {

[[noreturn]] void check_failed(std::string_view what, std::source_location where);

inline void check(bool holds, std::string_view what, std::source_location where = std::source_location::current()) {
  if (!holds) [[unlikely]] {
    check_failed(what, where);
  }
}

}  // namespace vericache
