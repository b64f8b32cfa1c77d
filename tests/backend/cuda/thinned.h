// Fewer cases under tools that slow kernels a thousand times: with VERICACHE_TEST_EVERY=n a test of many cases runs
// every n-th of them. One thread.
#pragma once

#include <algorithm>
#include <cstdlib>

namespace vericache {

inline int every_nth_case() {
  const char* const value = std::getenv("VERICACHE_TEST_EVERY");
  return value == nullptr ? 1 : std::max(1, std::atoi(value));
}
// Asked once a case.
inline bool left_out() {
  static int asked = 0;
  return asked++ % every_nth_case() != 0;
}
// Of `cases`, two at least where there are so many.
inline int thinned(int cases) {
  return std::min(cases, std::max(2, cases / every_nth_case()));
}

}  // namespace vericache
