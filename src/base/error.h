// Error: what went wrong at start-up (flags, files, memory), where, and what to do.
// Thrown from any thread that loads; caught once in main.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <utility>

namespace vericache {

class Error : public std::runtime_error {
 public:
  template <typename... Args>
  explicit Error(fmt::format_string<Args...> format, Args&&... args)
      : std::runtime_error(fmt::format(format, std::forward<Args>(args)...)) {}
};

// The command line was wrong: exit code 2 instead of 1.
class UsageError : public Error {
 public:
  using Error::Error;
};

}  // namespace vericache
