#include "base/check.h"

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>

namespace vericache {

void check_failed(std::string_view what, const char* file, int line, const char* function) {
  fmt::print(stderr, "vericache: bug at {}:{} ({}): {}\n", file, line, function, what);
  std::fflush(stderr);
  std::abort();
}

}  // namespace vericache
