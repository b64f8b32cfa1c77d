// Trace: what each lane did when, as a Chrome trace (chrome://tracing, Perfetto).
// Any thread.
#pragma once

#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

namespace vericache {

class Trace {
 public:
  explicit Trace(const std::filesystem::path& path);  // Error if it cannot be written
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // Seconds since a zero that all lanes share. Spans of one lane may come in any order.
  void span(std::string_view lane, std::string_view name, double begin, double end);

 private:
  void event(const std::string& json);

  std::mutex mutex_;
  std::ofstream file_;
  std::map<std::string, int, std::less<>> lanes_;  // name -> thread id of the trace
  bool first_ = true;
};

}  // namespace vericache
