#include "text/stop_strings.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "text/utf8.h"

namespace vericache {

StopStrings::StopStrings(std::vector<std::string> stops) {
  for (std::string& text : stops) {
    if (text.empty()) throw Error("a stop string is empty; leave it out");
    const size_t invalid = find_invalid_utf8(text);
    if (invalid != std::string_view::npos) throw Error("a stop string is not UTF-8 (byte {})", invalid);
    Stop stop{std::move(text), {0, 0}, 0};
    for (size_t i = 1, shorter = 0; i < stop.text.size(); ++i) {
      while (shorter > 0 && stop.text[i] != stop.text[shorter]) shorter = stop.fallback[shorter];
      if (stop.text[i] == stop.text[shorter]) ++shorter;
      stop.fallback.push_back(shorter);
    }
    stops_.push_back(std::move(stop));
  }
}

bool StopStrings::Stop::advance(char c) {
  while (matched > 0 && text[matched] != c) matched = fallback[matched];
  if (text[matched] == c) ++matched;
  return matched == text.size();
}

std::string StopStrings::push(std::string_view text) {
  if (stopped()) return {};
  for (const char c : text) {
    held_.push_back(c);
    const Stop* complete = nullptr;
    for (Stop& stop : stops_) {
      if (stop.advance(c) && (complete == nullptr || stop.text.size() > complete->text.size())) complete = &stop;
    }
    if (complete != nullptr) {
      matched_ = complete->text;
      held_.resize(held_.size() - matched_.size());
      return std::exchange(held_, {});
    }
  }
  size_t kept = 0;
  for (const Stop& stop : stops_) kept = std::max(kept, stop.matched);
  std::string out = held_.substr(0, held_.size() - kept);
  held_.erase(0, out.size());
  return out;
}

std::string StopStrings::flush() {
  return std::exchange(held_, {});
}

}  // namespace vericache
