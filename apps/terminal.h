// Terminal: one line of progress on stderr where that is a terminal, nothing where it is a pipe; numbers for people.
// Main thread.
#pragma once

#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>

namespace vericache {

class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  // Redraws at most ten times a second.
  void show(std::string_view what, size_t done, size_t total);
  void show(std::string_view text);
  void clear();

 private:
  bool due();
  void draw(std::string_view text);

  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_;
};

std::string bytes_text(double bytes);  // "52.4 MB"

// Writes all of it to stdout and flushes. Error if that fails (a full disk); a closed pipe ends the process by SIGPIPE.
void write_stdout(std::string_view text);

// Seconds since an arbitrary moment.
double now_seconds();
// The most memory that this process has held so far.
size_t peak_memory_bytes();

}  // namespace vericache
