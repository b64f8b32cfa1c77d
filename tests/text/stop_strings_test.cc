#include "text/stop_strings.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <optional>

#include "base/error.h"

namespace vericache {
namespace {

TEST(StopStrings, HoldsBackWhatMayBecomeAStopString) {
  StopStrings stops({"</end>", "STOP"});
  EXPECT_EQ(stops.push("hello <"), "hello ");
  EXPECT_EQ(stops.push("/e"), "");
  EXPECT_EQ(stops.push("x"), "</ex");
  EXPECT_EQ(stops.push("ST"), "");
  EXPECT_EQ(stops.push("STO"), "ST");
  EXPECT_FALSE(stops.stopped());
  EXPECT_EQ(stops.push("P and more"), "");
  EXPECT_TRUE(stops.stopped());
  EXPECT_EQ(stops.matched(), "STOP");
  EXPECT_EQ(stops.push("more"), "");
  EXPECT_EQ(stops.flush(), "");
}

TEST(StopStrings, FlushGivesWhatWasHeldBack) {
  StopStrings stops({"abc"});
  EXPECT_EQ(stops.push("xab"), "x");
  EXPECT_EQ(stops.flush(), "ab");
  EXPECT_FALSE(stops.stopped());
}

TEST(StopStrings, TheFirstToEndWinsThenTheLongest) {
  StopStrings stops({"c", "abc", "bcd"});
  EXPECT_EQ(stops.push("xabcd"), "x");
  EXPECT_EQ(stops.matched(), "abc");
}

TEST(StopStrings, RefusesEmptyAndInvalid) {
  EXPECT_THROW(StopStrings({"a", ""}), Error);
  EXPECT_THROW(StopStrings({"\xff"}), Error);
  StopStrings none({});
  EXPECT_EQ(none.push("text"), "text");
}

std::string few_letters(std::string text) {
  for (char& c : text) c = "ab"[static_cast<unsigned char>(c) % 2];
  return text;
}

// What the rule says, by trying every end.
std::optional<std::string> text_before_stop(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (text.substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    }
    if (longest > 0) return text.substr(0, end - longest);
  }
  return std::nullopt;
}

RC_GTEST_PROP(StopStringsProperty, AgreesWithASearchHoweverTheTextIsCut,
              (std::vector<std::string> stops, std::vector<std::string> parts)) {
  for (std::string& stop : stops) stop = few_letters("x" + stop.substr(0, 5));
  std::string whole, out;
  StopStrings watched(stops);
  for (std::string& part : parts) {
    part = few_letters(part);
    whole += part;
    out += watched.push(part);
    const bool ended = text_before_stop(whole, stops).has_value();
    RC_ASSERT(watched.stopped() == ended);  // reported at once
    RC_ASSERT(whole.starts_with(out));
  }
  out += watched.flush();
  RC_ASSERT(out == text_before_stop(whole, stops).value_or(whole));
}

}  // namespace
}  // namespace vericache
