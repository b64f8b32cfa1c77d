// FailureRun: reports on stderr that something began to fail, and is silent until it has worked again.
// Any thread.
#pragma once

#include <fmt/format.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>

namespace vericache {

class FailureRun {
 public:
  // `what` fails, in words: "disk /some/dir: reading".
  explicit FailureRun(std::string what) : what_(std::move(what)) {}

  bool failed(std::string_view why) {  // false
    if (!failing_.exchange(true)) {
      // fmt::print throws where stderr is closed; what fails here must not.
      std::fputs(fmt::format("vericache: {} failed: {}\n", what_, why).c_str(), stderr);
    }
    return false;
  }
  bool worked() {  // true
    failing_.store(false, std::memory_order_relaxed);
    return true;
  }

 private:
  std::string what_;
  std::atomic<bool> failing_ = false;
};

}  // namespace vericache
