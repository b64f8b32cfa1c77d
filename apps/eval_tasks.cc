#include "eval_tasks.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "base/check.h"
#include "text/long_tasks.h"
#include "text/records.h"

namespace vericache {
namespace {

// Room behind the right answer: its end token, and the beginning of what is too much.
constexpr int kSlack = 16;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

std::set<std::string> words_of(std::string_view text) {
  std::set<std::string> words;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = text.find_first_not_of(" ,\t\r\n", at);
    if (begin == std::string_view::npos) {
      break;
    }
    at = std::min(text.find_first_of(" ,\t\r\n", begin), text.size());
    words.emplace(text.substr(begin, at - begin));
  }
  return words;
}

std::optional<LongTask> long_task(std::string_view workload) {
  static const std::map<std::string_view, LongTask> kTasks = {{"needle", LongTask::needle},
                                                              {"multikey", LongTask::multikey},
                                                              {"multivalue", LongTask::multivalue},
                                                              {"multiquery", LongTask::multiquery},
                                                              {"variables", LongTask::variables},
                                                              {"common-words", LongTask::common_words},
                                                              {"frequent-words", LongTask::frequent_words}};
  const auto task = kTasks.find(workload);
  return task == kTasks.end() ? std::nullopt : std::optional(task->second);
}

}  // namespace

int EvalSet::longest() const {
  size_t longest = 0;
  for (const EvalPrompt& prompt : prompts) {
    longest = std::max(longest, prompt.ids.size() + static_cast<size_t>(prompt.max_tokens));
  }
  return static_cast<int>(longest);
}

const std::vector<EvalWorkload>& eval_workloads() {
  static const std::vector<EvalWorkload> kWorkloads = {
      {"code", "continues source files; no answer is the right one, so texts are compared with the full cache's"},
      {"calls", "12 tool calls whose arguments stand in the records"},
      {"export", "14 neighbouring records as JSON"},
      {"needle", "one field of one record, at depths from the first to the last"},
      {"multikey", "the same, among up to 40 records whose ids differ from the asked one in a single digit"},
      {"multivalue", "an order that has four records: all four codes"},
      {"multiquery", "4 tool calls for orders that lie anywhere"},
      {"variables", "five variables share a value through a chain of assignments: their names"},
      {"common-words", "the ten words of a list that come more often than the others"},
      {"frequent-words", "the three cities that most records have"}};
  return kWorkloads;
}

EvalSet make_eval_set(std::string_view workload, const EvalLengths& lengths, uint64_t seed, const Tokenizer& tokenizer,
                      const SourceTree* tree) {
  EvalSet set;
  set.workload = workload;
  set.context = lengths.context;
  const auto count = [&](std::string_view text) { return static_cast<int>(tokenizer.encode(text, true).size()); };
  for (int i = 0; i < lengths.documents; ++i) {
    const uint64_t document_seed = seed + static_cast<uint64_t>(i);
    EvalPrompt prompt;
    if (workload == "code") {
      check(tree != nullptr, "code is cut from a source tree");
      prompt.ids = tree->document(tokenizer, lengths.context, i, lengths.documents);
      prompt.max_tokens = lengths.code_tokens;
      set.prompts.push_back(std::move(prompt));
      continue;
    }
    std::string text;
    if (const std::optional<LongTask> task = long_task(workload)) {
      const double depth = lengths.documents == 1 ? 0.5 : static_cast<double>(i) / (lengths.documents - 1);
      const LongRequest request = long_request_near(document_seed, *task, depth, lengths.context, count);
      text = request.prompt;
      prompt.expected = request.expected;
      prompt.items = request.items;
      prompt.ordered = request.ordered;
    } else {
      const RecordsTask records = workload == "export" ? RecordsTask::export_json : RecordsTask::calls;
      const RecordsRequest request = records_request_near(document_seed, records, lengths.context, count);
      text = request.prompt;
      prompt.expected = request.expected;
      prompt.items = lines_of(request.expected);
    }
    prompt.ids = tokenizer.encode(text, true);
    const int right = static_cast<int>(tokenizer.encode(prompt.expected).size());
    prompt.max_tokens = std::min(right + kSlack, lengths.answer_tokens);
    set.prompts.push_back(std::move(prompt));
  }
  return set;
}

Grade grade(const EvalPrompt& prompt, std::string_view answer) {
  Grade result;
  const std::set<std::string> wanted(prompt.items.begin(), prompt.items.end());
  std::set<std::string> given;
  if (prompt.ordered) {
    const std::vector<std::string> lines = lines_of(std::string(answer));
    given.insert(lines.begin(), lines.end());
    result.right = answer == prompt.expected;
  } else {
    given = words_of(answer);
    result.right = given == wanted;
  }
  for (const std::string& item : wanted) {
    result.items += given.count(item) > 0 ? 1.0 / static_cast<double>(wanted.size()) : 0;
  }
  return result;
}

}  // namespace vericache
