// TempDirectory: a folder of its own for one test, removed at its end; and what an Error says.
// Belongs to one thread.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "base/error.h"

namespace vericache {

class TempDirectory {
 public:
  TempDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "vericache-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) {
      throw Error("cannot make {}", pattern);
    }
    path_ = pattern;
  }
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(std::string_view name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

// What the Error thrown by `act` says; empty if nothing was thrown.
template <typename Act>
std::string error_of(Act&& act) {
  try {
    act();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// The message must name what was wrong, and (every one of ours does) be one line.
#define EXPECT_ERROR(act, part)                                                                    \
  do {                                                                                             \
    const std::string said = ::vericache::error_of([&] { act; });                                  \
    EXPECT_NE(said.find(part), std::string::npos) << "expected \"" << (part) << "\" in: " << said; \
    EXPECT_EQ(said.find('\n'), std::string::npos) << said;                                         \
  } while (false)

}  // namespace vericache
