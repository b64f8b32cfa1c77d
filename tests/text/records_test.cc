// GCC 12 with -fsanitize=address mistakes std::regex's move constructors for reads of uninitialized memory.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "text/records.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/hash.h"

namespace vericache {
namespace {

using Fields = std::map<std::string, std::string>;

// Documents of the generator that the models were trained on, 3 records each: a prompt and the right answer.
struct Example {
  const char* prompt;
  const char* expected;
};
const Example kTrainingDocuments[] = {
    {R"(<|system|>
Tools:
{"name": "open_ticket", "parameters": ["customer", "order_id", "code"]}
{"name": "notify_customer", "parameters": ["email", "status"]}
<|end|>
<|user|>
order 60494: customer=Roulist Dorkelce email=roulist.dorkelce@saisten.example city=Ghent amount=140.47 status=shipped code=84932af3
order 56372: customer=Ossace Umulten email=ossace.umulten@ludor.example city=Oslo amount=611.67 status=paid code=7a26774e
order 21955: customer=Osist Shikelrin email=osist.shikelrin@tasa.example city=Tampa amount=547.14 status=paid code=e2ca7956
Open a ticket for orders 21955, 60494, 56372.<|end|>
<|assistant|>
)",
     R"({"name": "open_ticket", "arguments": {"customer": "Osist Shikelrin", "order_id": "21955", "code": "e2ca7956"}}
{"name": "open_ticket", "arguments": {"customer": "Roulist Dorkelce", "order_id": "60494", "code": "84932af3"}}
{"name": "open_ticket", "arguments": {"customer": "Ossace Umulten", "order_id": "56372", "code": "7a26774e"}})"},
    {R"(<|system|>
Tools:
{"name": "refund_order", "parameters": ["order_id", "email", "amount"]}
{"name": "ship_order", "parameters": ["order_id", "city", "customer"]}
<|end|>
<|user|>
{"order_id": "65187", "customer": "Shiumce Vata", "email": "shiumce.vata@romi.example", "city": "Basel", "amount": 861.91, "status": "pending", "code": "5df534e2"}
{"order_id": "66782", "customer": "Elrofa Torgre", "email": "elrofa.torgre@greda.example", "city": "Accra", "amount": 782.18, "status": "refunded", "code": "99931bc4"}
{"order_id": "89636", "customer": "Osvalu Quadarin", "email": "osvalu.quadarin@enwigre.example", "city": "Omaha", "amount": 547.15, "status": "refunded", "code": "65a0124b"}
What is the amount of order 89636?<|end|>
<|assistant|>
)",
     R"(547.15)"},
    {R"(<|system|>
Tools:
{"name": "ship_order", "parameters": ["order_id", "city", "customer"]}
{"name": "open_ticket", "parameters": ["customer", "order_id", "code"]}
{"name": "update_record", "parameters": ["order_id", "status", "code"]}
<|end|>
<|user|>
order_id,customer,email,city,amount,status,code
99595,Ulist Elgremi,ulist.elgremi@jokelum.example,Perth,254.75,shipped,04e61538
31760,Torrinfa Eltorum,torrinfa.eltorum@ceha.example,Kyoto,290.95,paid,099bc11d
19601,Jova Vael,jova.vael@fami.example,Omaha,70.74,pending,2cabdea8
List the 2 records from order 31760 as JSON.<|end|>
<|assistant|>
)",
     R"({"order_id": "31760", "customer": "Torrinfa Eltorum", "email": "torrinfa.eltorum@ceha.example", "city": "Kyoto", "amount": 290.95, "status": "paid", "code": "099bc11d"}
{"order_id": "19601", "customer": "Jova Vael", "email": "jova.vael@fami.example", "city": "Omaha", "amount": 70.74, "status": "pending", "code": "2cabdea8"})"},
};

// What can be read out of a prompt: this test solves a prompt from its text alone.
struct Document {
  std::vector<std::string> tools;
  std::vector<Fields> records;
  std::string form;
  std::string asked;
};

const char kName[] = "[A-Z][a-z]{3,8} [A-Z][a-z]{3,8}";
const char kEmail[] = "[a-z]{4,9}\\.[a-z]{4,9}@[a-z]{4,9}\\.example";
const char kCity[] = "[A-Z][a-z]{3,4}";
const char kAmount[] = "[1-9][0-9]{0,2}\\.(?:0|[0-9]?[1-9])";
const char kStatus[] = "shipped|pending|paid|refunded|lost|held";
const char kCode[] = "[0-9a-f]{8}";
const char kId[] = "[1-9][0-9]{4}";

std::regex record_pattern(const std::string& form) {
  const auto group = [](const std::string& pattern) { return "(" + pattern + ")"; };
  const auto quoted = [&](const std::string& name, const std::string& pattern) {
    return "\"" + name + "\": \"" + group(pattern) + "\"";
  };
  if (form == "text") {
    return std::regex("order " + group(kId) + ": customer=" + group(kName) + " email=" + group(kEmail) +
                      " city=" + group(kCity) + " amount=" + group(kAmount) + " status=" + group(kStatus) +
                      " code=" + group(kCode));
  }
  if (form == "csv") {
    return std::regex(group(kId) + "," + group(kName) + "," + group(kEmail) + "," + group(kCity) + "," +
                      group(kAmount) + "," + group(kStatus) + "," + group(kCode));
  }
  return std::regex("\\{" + quoted("order_id", kId) + ", " + quoted("customer", kName) + ", " +
                    quoted("email", kEmail) + ", " + quoted("city", kCity) + ", \"amount\": " + group(kAmount) + ", " +
                    quoted("status", kStatus) + ", " + quoted("code", kCode) + "\\}");
}

const std::map<std::string, std::vector<std::string>>& tool_parameters() {
  static const std::map<std::string, std::vector<std::string>> parameters = {
      {"refund_order", {"order_id", "email", "amount"}}, {"ship_order", {"order_id", "city", "customer"}},
      {"notify_customer", {"email", "status"}},          {"update_record", {"order_id", "status", "code"}},
      {"open_ticket", {"customer", "order_id", "code"}},
  };
  return parameters;
}

std::string declaration(const std::string& tool) {
  std::string out;
  for (const std::string& parameter : tool_parameters().at(tool)) {
    out.append(out.empty() ? "\"" : ", \"").append(parameter).append("\"");
  }
  return "{\"name\": \"" + tool + "\", \"parameters\": [" + out + "]}";
}

// Reads every line of a prompt, or records a failure.
Document read(const std::string& prompt) {
  Document document;
  std::istringstream in(prompt);
  std::string line;
  const auto expect_line = [&](const std::string& wanted) {
    EXPECT_TRUE(std::getline(in, line));
    EXPECT_EQ(line, wanted);
  };
  expect_line("<|system|>");
  expect_line("Tools:");
  while (std::getline(in, line) && line != "<|end|>") {
    const std::string tool = line.substr(10, line.find('"', 10) - 10);
    EXPECT_TRUE(tool_parameters().count(tool)) << line;
    EXPECT_EQ(line, declaration(tool));
    document.tools.push_back(tool);
  }
  expect_line("<|user|>");
  const char* names[] = {"order_id", "customer", "email", "city", "amount", "status", "code"};
  std::regex pattern;
  while (std::getline(in, line)) {
    if (document.form.empty()) {
      document.form = line[0] == '{' ? "json" : line.rfind("order ", 0) == 0 ? "text" : "csv";
      pattern = record_pattern(document.form);
      if (document.form == "csv") {
        EXPECT_EQ(line, "order_id,customer,email,city,amount,status,code");
        continue;
      }
    }
    std::smatch match;
    if (!std::regex_match(line, match, pattern)) {
      break;
    }
    Fields record;
    for (size_t i = 0; i < 7; ++i) {
      record[names[i]] = match[i + 1];
    }
    document.records.push_back(record);
  }
  EXPECT_TRUE(line.ends_with("<|end|>")) << line;
  document.asked = line.substr(0, line.size() - 7);
  expect_line("<|assistant|>");
  EXPECT_FALSE(std::getline(in, line)) << line;
  EXPECT_EQ(prompt.back(), '\n');
  return document;
}

std::string object(const Fields& record, const std::vector<std::string>& fields) {
  std::string out = "{";
  for (const std::string& field : fields) {
    const char* quote = field == "amount" ? "" : "\"";
    out.append(out.size() > 1 ? ", \"" : "\"").append(field).append("\": ");
    out.append(quote).append(record.at(field)).append(quote);
  }
  return out + "}";
}

std::string joined(const std::vector<std::string>& lines) {
  std::string out;
  for (const std::string& line : lines) {
    out.append(out.empty() ? "" : "\n").append(line);
  }
  return out;
}

struct Solved {
  std::string answer;
  size_t asked_for = 0;
};

// The right answer to the turn of a document: written from the form's description, not from the generator.
Solved solve(const Document& document) {
  std::map<std::string, size_t> by_id;
  for (size_t i = 0; i < document.records.size(); ++i) {
    EXPECT_TRUE(by_id.emplace(document.records[i].at("order_id"), i).second) << "an id stands twice";
  }
  const auto record_of = [&](const std::string& id) -> const Fields& { return document.records.at(by_id.at(id)); };
  const std::string& asked = document.asked;
  std::smatch match;
  if (std::regex_match(asked, match, std::regex("What is the ([a-z_]+) of order ([0-9]{5})\\?"))) {
    return {record_of(match[2]).at(match[1]), 1};
  }
  std::vector<std::string> lines;
  if (std::regex_match(asked, match, std::regex("List the ([0-9]+) records from order ([0-9]{5}) as JSON\\."))) {
    const size_t first = by_id.at(match[2]);
    for (size_t i = first; i < first + std::stoul(match[1]); ++i) {
      lines.push_back(
          object(document.records.at(i), {"order_id", "customer", "email", "city", "amount", "status", "code"}));
    }
    return {joined(lines), lines.size()};
  }
  const std::map<std::string, std::string> verbs = {{"Refund orders ", "refund_order"},
                                                    {"Ship orders ", "ship_order"},
                                                    {"Notify the customer of orders ", "notify_customer"},
                                                    {"Update the record of orders ", "update_record"},
                                                    {"Open a ticket for orders ", "open_ticket"}};
  for (const auto& [verb, tool] : verbs) {
    if (asked.rfind(verb, 0) != 0) {
      continue;
    }
    EXPECT_NE(std::find(document.tools.begin(), document.tools.end(), tool), document.tools.end());
    const std::string ids = asked.substr(verb.size());
    EXPECT_TRUE(std::regex_match(ids, std::regex("[0-9]{5}(, [0-9]{5})*\\."))) << ids;
    std::set<std::string> different;
    for (size_t at = 0; at < ids.size(); at += 7) {
      different.insert(ids.substr(at, 5));
      lines.push_back("{\"name\": \"" + tool +
                      "\", \"arguments\": " + object(record_of(ids.substr(at, 5)), tool_parameters().at(tool)) + "}");
    }
    EXPECT_EQ(different.size(), lines.size());
    return {joined(lines), lines.size()};
  }
  ADD_FAILURE() << "no such request: " << asked;
  return {};
}

constexpr std::array kTasks = {RecordsTask::calls, RecordsTask::export_json, RecordsTask::question};

TEST(Records, TheSolverSolvesTrainingDocuments) {
  for (const Example& example : kTrainingDocuments) {
    const Document document = read(example.prompt);
    EXPECT_EQ(document.records.size(), 3u);
    EXPECT_EQ(solve(document).answer, example.expected);
  }
}

TEST(Records, ExpectedIsTheRightAnswer) {
  std::set<std::string> forms;
  std::set<size_t> tool_counts;
  std::set<std::string> asked;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    for (const RecordsTask task : kTasks) {
      const RecordsRequest request = records_request(seed, 30, task);
      const Document document = read(request.prompt);
      ASSERT_EQ(document.records.size(), 30u);
      const Solved solved = solve(document);
      EXPECT_EQ(solved.answer, request.expected);
      EXPECT_EQ(solved.asked_for, task == RecordsTask::calls ? 12u : task == RecordsTask::export_json ? 14u : 1u);
      forms.insert(document.form);
      tool_counts.insert(document.tools.size());
      asked.insert(document.asked.substr(0, 12));
    }
  }
  EXPECT_EQ(forms.size(), 3u);
  EXPECT_EQ(tool_counts, (std::set<size_t>{2, 3, 4, 5}));
  EXPECT_EQ(asked.size(), 7u) << "five tools, a list, a question";
}

TEST(Records, FewRecordsAskForFewer) {
  for (const RecordsTask task : kTasks) {
    for (const int records : {1, 5}) {
      const RecordsRequest request = records_request(3, records, task);
      const Solved solved = solve(read(request.prompt));
      EXPECT_EQ(solved.answer, request.expected);
      EXPECT_EQ(solved.asked_for, task == RecordsTask::question ? 1u : static_cast<size_t>(records));
    }
  }
}

TEST(Records, ManyRecordsHaveDifferentIds) {
  const Document document = read(records_request(1, 5000, RecordsTask::question).prompt);
  std::set<std::string> ids;
  for (const Fields& record : document.records) {
    ids.insert(record.at("order_id"));
  }
  EXPECT_EQ(ids.size(), 5000u);
}

TEST(Records, MoreRecordsContinueTheSameDocument) {
  const std::string few = records_request(9, 20, RecordsTask::calls).prompt;
  const std::string many = records_request(9, 21, RecordsTask::calls).prompt;
  const std::string records = few.substr(0, few.rfind('\n', few.rfind("<|end|>")) + 1);
  EXPECT_EQ(many.substr(0, records.size()), records);
}

// Seeds name documents: figures that people keep must stay comparable.
TEST(Records, SeedsKeepTheirDocuments) {
  std::vector<uint64_t> hashes;
  for (const RecordsTask task : kTasks) {
    const RecordsRequest request = records_request(7, 40, task);
    const std::string text = request.prompt + request.expected;
    EXPECT_EQ(request.prompt, records_request(7, 40, task).prompt);
    EXPECT_NE(request.prompt, records_request(8, 40, task).prompt);
    hashes.push_back(hash_bytes(text.data(), text.size()));
  }
  EXPECT_EQ(hashes, (std::vector<uint64_t>{17625495223219889023u, 10746236490295882304u, 2749947082354702713u}));
}

TEST(Records, RefusesImpossibleCounts) {
  EXPECT_THROW(records_request(1, 0, RecordsTask::calls), Error);
  EXPECT_THROW(records_request(1, -5, RecordsTask::calls), Error);
  EXPECT_THROW(records_request(1, kMostRecords + 1, RecordsTask::calls), Error);
}

// A stand-in for a tokenizer: a token for each run of letters, each digit, each other character.
int count_some_tokens(std::string_view text) {
  int tokens = 0;
  bool in_word = false;
  for (const char c : text) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    tokens += !(letter && in_word);
    in_word = letter;
  }
  return tokens;
}

TEST(Records, NearATargetIsWithinARecord) {
  for (const RecordsTask task : kTasks) {
    for (const int target : {600, 2000, 8000, 30'000}) {
      int calls = 0;
      const auto count = [&](std::string_view text) {
        ++calls;
        return count_some_tokens(text);
      };
      const RecordsRequest request = records_request_near(5, task, target, count);
      EXPECT_LE(calls, 20);
      const int tokens = count_some_tokens(request.prompt);
      EXPECT_LE(tokens, target);
      const int records = static_cast<int>(read(request.prompt).records.size());
      EXPECT_EQ(request.prompt, records_request(5, records, task).prompt);
      EXPECT_GT(count_some_tokens(records_request(5, records + 1, task).prompt), target);
      EXPECT_GT(tokens, target - 150) << "a record is not longer than that";
    }
  }
}

TEST(Records, NearATargetEndsForAnyCount) {
  EXPECT_THROW(records_request_near(5, RecordsTask::calls, 20, count_some_tokens), Error);
  int calls = 0;
  const auto step = [&](std::string_view text) {
    ++calls;
    return text.size() < 50'000 ? 1 : 1'000'000;
  };
  EXPECT_LT(records_request_near(5, RecordsTask::calls, 1000, step).prompt.size(), 50'000u);
  EXPECT_LE(calls, 80);
}

}  // namespace
}  // namespace vericache
