// StopStrings: watches streamed text for strings that end it.
// One thread at a time; each stream has its own.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace vericache {

class StopStrings {
 public:
  // Throws Error for an empty stop string or one that is not UTF-8.
  explicit StopStrings(std::vector<std::string> stops);

  // Takes the next text and gives what can be passed on: all that is not part of a stop string and cannot become one.
  // When one is complete, gives the text before it and stopped() is true; what comes later is ignored. The first to be
  // complete wins, of several that end at once the longest: how the text was cut into pieces does not matter.
  std::string push(std::string_view text);
  // The end of the stream: what was held back.
  std::string flush();

  bool stopped() const { return !matched_.empty(); }
  // The stop string that was found; empty before.
  const std::string& matched() const { return matched_; }

 private:
  // Knuth, Morris and Pratt 1977: matched is how much of `text` the stream ends with.
  struct Stop {
    std::string text;
    std::vector<size_t> fallback;  // by length matched: the next shorter prefix that is a suffix too
    size_t matched = 0;
    bool advance(char c);  // true: complete
  };

  std::vector<Stop> stops_;
  std::string held_;
  std::string matched_;
};

}  // namespace vericache
