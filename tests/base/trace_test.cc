// A trace is JSON that viewers read: lanes with names, spans in microseconds.
#include "base/trace.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.h"

namespace vericache {
namespace {

TEST(Trace, NamesEachLaneOnceAndGivesSpansInMicroseconds) {
  const std::filesystem::path path = std::filesystem::temp_directory_path() / "vericache_trace_test.json";
  {
    Trace trace(path);
    trace.span("draft", "4 sequences", 1.5, 1.5061);
    trace.span("wire in", "layer 0", 1.25, 1.25);
    trace.span("draft", "4 sequences", 1.0, 1.25);
  }
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  std::filesystem::remove(path);
  EXPECT_EQ(text.str(),
            "[\n"
            R"({"ph":"M","pid":1,"tid":1,"name":"thread_name","args":{"name":"draft"}},)"
            "\n"
            R"({"ph":"X","pid":1,"tid":1,"name":"4 sequences","ts":1500000.000,"dur":6100.000},)"
            "\n"
            R"({"ph":"M","pid":1,"tid":2,"name":"thread_name","args":{"name":"wire in"}},)"
            "\n"
            R"({"ph":"X","pid":1,"tid":2,"name":"layer 0","ts":1250000.000,"dur":0.000},)"
            "\n"
            R"({"ph":"X","pid":1,"tid":1,"name":"4 sequences","ts":1000000.000,"dur":250000.000})"
            "\n]\n");
}

TEST(Trace, SaysWhereItCannotBeWritten) {
  EXPECT_THROW(Trace("/no/such/folder/trace.json"), Error);
}

}  // namespace
}  // namespace vericache
