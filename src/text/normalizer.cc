#include "text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "base/error.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace vericache {
namespace {

constexpr int kMaxDecomposition = 32;  // canonical decompositions have at most 4 code points

int combining_class(int32_t c) {
  return utf8proc_get_property(c)->combining_class;
}

// utf8proc's own ordering moves marks one place at a time, quadratic for a long run; this one sorts each run.
void order_marks(std::vector<int32_t>& points) {
  const auto is_mark = [](int32_t c) { return combining_class(c) != 0; };
  auto run = std::find_if(points.begin(), points.end(), is_mark);
  while (run != points.end()) {
    const auto end = std::find_if_not(run, points.end(), is_mark);
    std::stable_sort(run, end, [](int32_t a, int32_t b) { return combining_class(a) < combining_class(b); });
    run = std::find_if(end, points.end(), is_mark);
  }
}

void compose_into(std::vector<int32_t>& points, std::string& out) {
  if (points.empty()) return;
  order_marks(points);
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  const utf8proc_ssize_t count =
      utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()), options);
  check(count >= 0, "utf8proc could not compose");
  for (utf8proc_ssize_t i = 0; i < count; ++i) {
    append_utf8(out, static_cast<char32_t>(points[i]));
  }
  points.clear();
}

void decompose_into(char32_t c, std::vector<int32_t>& points) {
  int32_t parts[kMaxDecomposition];
  int boundary = 0;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE);
  const utf8proc_ssize_t count =
      utf8proc_decompose_char(static_cast<int32_t>(c), parts, kMaxDecomposition, options, &boundary);
  check(count >= 0 && count <= kMaxDecomposition, "utf8proc could not decompose");
  points.insert(points.end(), parts, parts + count);
}

}  // namespace

std::string to_nfc(std::string_view text) {
  // Nothing below U+0300 (first byte 0xCC) decomposes and recombines to anything but itself.
  if (std::none_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) >= 0xCC; })) {
    return std::string(text);
  }
  std::string out;
  out.reserve(text.size());
  std::vector<int32_t> points;
  for (size_t pos = 0; pos < text.size();) {
    const char32_t c = next_code_point(text, pos);
    if (unknown_to_nfc(c)) {
      compose_into(points, out);
      append_utf8(out, c);
      continue;
    }
    // ASCII starts afresh, so that the buffer stays in cache.
    if (c < 0x80 && points.size() >= 1024) compose_into(points, out);
    decompose_into(c, points);
  }
  compose_into(points, out);
  return out;
}

namespace {

struct Apply {
  std::string& text;
  size_t max_bytes;
  void operator()(const Nfc&) const { text = to_nfc(text); }
  void operator()(const Prepend& step) const {
    if (!text.empty()) text.insert(0, step.text);
  }
  void operator()(const Replace& step) const { text = step.pattern.replace(text, step.content, max_bytes); }
};

}  // namespace

std::string Normalizer::apply(std::string_view text) const {
  // Steps that multiply the text would fill the memory: no real normalizer does.
  const size_t max_bytes = 16 * text.size() + (size_t{64} << 10);
  std::string out(text);
  for (const Step& step : steps_) {
    std::visit(Apply{out, max_bytes}, step);
    if (out.size() > max_bytes)
      throw Error("the normalizer makes {} bytes of text {} bytes long", text.size(), out.size());
  }
  return out;
}

}  // namespace vericache
