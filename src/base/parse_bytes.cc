#include "base/parse_bytes.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <utility>

#include "base/error.h"

namespace vericache {

size_t parse_bytes(std::string_view text, std::string_view flag) {
  if (text == "auto" || text == "0") {
    return 0;
  }
  double number = 0;
  const auto [rest, failure] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  std::string_view unit(rest, static_cast<size_t>(text.data() + text.size() - rest));
  if (unit.ends_with("B")) {
    unit.remove_suffix(1);
  }
  constexpr std::pair<std::string_view, double> kUnits[] = {
      {"", 1},     {"K", 1e3},     {"k", 1e3},     {"M", 1e6},     {"G", 1e9},
      {"T", 1e12}, {"Ki", 0x1p10}, {"Mi", 0x1p20}, {"Gi", 0x1p30}, {"Ti", 0x1p40}};
  const auto* found =
      std::find_if(std::begin(kUnits), std::end(kUnits), [&](const auto& u) { return u.first == unit; });
  if (failure != std::errc{} || found == std::end(kUnits) || !(number > 0)) {
    throw UsageError("{} '{}' is not a size: write bytes as 500000000, 500M, 0.5G or 512Mi, or 'auto'", flag, text);
  }
  const double bytes = number * found->second;
  if (bytes < 1 || bytes >= 0x1p62) {
    throw UsageError("{} '{}' is out of range: no machine has it", flag, text);
  }
  return static_cast<size_t>(std::llround(bytes));
}

}  // namespace vericache
