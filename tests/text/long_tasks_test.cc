#include "text/long_tasks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"

namespace vericache {
namespace {

constexpr LongTask kAll[] = {LongTask::needle,    LongTask::multikey,     LongTask::multivalue,    LongTask::multiquery,
                             LongTask::variables, LongTask::common_words, LongTask::frequent_words};

// The lines between "<|user|>" and the question, and the question.
struct Read {
  std::vector<std::string> lines;
  std::string asked;
};
Read read(const LongRequest& request) {
  const size_t begin = request.prompt.find("<|user|>\n") + 9;
  const size_t end = request.prompt.rfind("<|end|>\n<|assistant|>\n");
  EXPECT_EQ(end + 22, request.prompt.size());
  std::istringstream in(request.prompt.substr(begin, end - begin));
  Read out;
  for (std::string line; std::getline(in, line);) {
    out.lines.push_back(line);
  }
  out.asked = out.lines.back();
  out.lines.pop_back();
  return out;
}

int count_lines(const Read& document, const std::string& what) {
  return static_cast<int>(std::count_if(document.lines.begin(), document.lines.end(),
                                        [&](const std::string& line) { return line.find(what) != std::string::npos; }));
}
std::string id_in(const std::string& asked) {
  const size_t at = asked.find("order ") + 6;
  return asked.substr(at, 5);
}

TEST(LongTasks, TheSameArgumentsGiveTheSameText) {
  for (const LongTask task : kAll) {
    const LongRequest a = long_request(5, 40, task, 0.5);
    EXPECT_EQ(a.prompt, long_request(5, 40, task, 0.5).prompt);
    EXPECT_NE(a.prompt, long_request(6, 40, task, 0.5).prompt);
    EXPECT_FALSE(a.items.empty());
    for (const std::string& item : a.items) {
      EXPECT_NE(a.expected.find(item), std::string::npos);
    }
  }
}

TEST(LongTasks, EverySizeWorks) {
  for (const LongTask task : kAll) {
    for (const int size : {1, 2, 3, 4, 5, 9, 100}) {
      EXPECT_NO_THROW(long_request(1, size, task, 1.0)) << static_cast<int>(task) << " " << size;
    }
    EXPECT_THROW(long_request(1, 0, task, 0.5), Error);
    EXPECT_THROW(long_request(1, kMostLongSize + 1, task, 0.5), Error);
  }
}

TEST(LongTasks, TheNeedleLiesWhereItShould) {
  for (const auto& [depth, place] : {std::pair{0.0, 0u}, {0.5, 50u}, {1.0, 100u}}) {
    const LongRequest request = long_request(7, 101, LongTask::needle, depth);
    const Read document = read(request);
    const size_t head = document.lines.size() - 101;  // the head of a CSV
    EXPECT_NE(document.lines[head + place].find(id_in(document.asked)), std::string::npos);
    EXPECT_NE(document.lines[head + place].find(request.expected), std::string::npos);
    EXPECT_EQ(count_lines(document, id_in(document.asked)), 1);
  }
}

TEST(LongTasks, TwinsDifferInOneDigit) {
  const LongRequest request = long_request(8, 100, LongTask::multikey, 0.3);
  const Read document = read(request);
  const std::string id = id_in(document.asked);
  EXPECT_EQ(count_lines(document, id), 1);
  int twins = 0;
  for (size_t digit = 0; digit < id.size(); ++digit) {
    for (char c = '0'; c <= '9'; ++c) {
      std::string twin = id;
      twin[digit] = c;
      twins += twin != id && count_lines(document, twin) == 1 ? 1 : 0;
    }
  }
  EXPECT_GT(twins, 15);
}

TEST(LongTasks, OneKeyHasSeveralValues) {
  const LongRequest request = long_request(9, 50, LongTask::multivalue, 0);
  const Read document = read(request);
  ASSERT_EQ(request.items.size(), 4u);
  EXPECT_FALSE(request.ordered);
  const size_t at = document.asked.find("order ") + 6;
  EXPECT_EQ(count_lines(document, document.asked.substr(at, 5)), 4);
  for (const std::string& code : request.items) {
    EXPECT_EQ(count_lines(document, code), 1);
  }
}

TEST(LongTasks, QueriesAreToolCalls) {
  const LongRequest request = long_request(10, 50, LongTask::multiquery, 0);
  ASSERT_EQ(request.items.size(), 4u);
  EXPECT_TRUE(request.ordered);
  EXPECT_EQ(std::count(request.expected.begin(), request.expected.end(), '\n'), 3);
  for (const std::string& item : request.items) {
    EXPECT_TRUE(item.starts_with("{\"name\": \"") && item.ends_with("}}")) << item;
  }
}

TEST(LongTasks, TheChainLeadsBackToTheValue) {
  const LongRequest request = long_request(11, 60, LongTask::variables, 0);
  std::map<std::string, std::string> value;  // solved from the text, in its order
  for (const std::string& line : read(request).lines) {
    if (line.starts_with("VAR ")) {
      const size_t equals = line.find(" = ");
      const std::string right = line.substr(equals + 3);
      value[line.substr(4, equals - 4)] = right.starts_with("VAR ") ? value.at(right.substr(4)) : right;
    }
  }
  const std::string asked = read(request).asked;
  ASSERT_EQ(value.size(), 5u);
  for (const std::string& name : request.items) {
    EXPECT_NE(asked.find("value " + value.at(name)), std::string::npos);
  }
}

std::vector<std::string> most_common(const std::map<std::string, int>& counts, size_t most) {
  std::vector<std::pair<int, std::string>> sorted;
  for (const auto& [word, count] : counts) {
    sorted.emplace_back(-count, word);
  }
  std::sort(sorted.begin(), sorted.end());
  EXPECT_LT(sorted[most - 1].first, sorted[most].first) << "the answer is unambiguous";
  std::vector<std::string> words;
  for (size_t i = 0; i < most; ++i) {
    words.push_back(sorted[i].second);
  }
  std::sort(words.begin(), words.end());
  return words;
}

TEST(LongTasks, CommonWordsAreTheMostCommon) {
  for (const int size : {1, 20, 100}) {
    LongRequest request = long_request(12, size, LongTask::common_words, 0);
    std::map<std::string, int> counts;
    for (const std::string& line : read(request).lines) {
      if (const size_t dot = line.find(". "); dot != std::string::npos) {
        ++counts[line.substr(dot + 2)];
      }
    }
    std::sort(request.items.begin(), request.items.end());
    EXPECT_EQ(most_common(counts, 10), request.items);
  }
}

TEST(LongTasks, FrequentCitiesAreTheMostFrequent) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    for (const int size : {4, 11, 90}) {
      LongRequest request = long_request(seed, size, LongTask::frequent_words, 0);
      const std::string whole = request.prompt;
      std::map<std::string, int> counts;
      // Every form writes the amount right behind the city.
      for (const std::string& line : read(request).lines) {
        for (const auto& [before, after] :
             {std::pair{" city=", " amount="}, {"\"city\": \"", "\", \"amount\""}, {".example,", ","}}) {
          const size_t begin = line.find(before);
          if (begin != std::string::npos) {
            const size_t from = begin + std::string(before).size();
            ++counts[line.substr(from, line.find(after, from) - from)];
            break;
          }
        }
      }
      counts.emplace("nowhere", 0);
      std::sort(request.items.begin(), request.items.end());
      EXPECT_EQ(most_common(counts, 3), request.items) << whole;
    }
  }
}

TEST(LongTasks, TheTargetIsMetFromBelow) {
  const auto count = [](std::string_view text) { return static_cast<int>(text.size() / 3); };
  for (const LongTask task : kAll) {
    const LongRequest request = long_request_near(3, task, 0.5, 2500, count);
    EXPECT_LE(count(request.prompt), 2500);
    EXPECT_GT(count(request.prompt), 2000);
    EXPECT_THROW(long_request_near(3, task, 0.5, 10, count), Error);
  }
}

}  // namespace
}  // namespace vericache
