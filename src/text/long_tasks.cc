#include "text/long_tasks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"
#include "text/record_rows.h"

namespace vericache {
namespace {

using namespace records;

constexpr int kSeveral = 4;  // values of a key, keys of a query
constexpr int kChain = 5;    // variables of one value
constexpr int kCommon = 10;
constexpr int kFrequent = 3;
constexpr std::array<Field, 6> kAskable = {kEmail, kCity, kAmount, kStatus, kCode, kCustomer};

struct Document {
  std::vector<std::string> lines;
  std::string asked;
  std::string expected;
  std::vector<std::string> items;
  bool ordered = true;
};

void add_rows(const std::vector<Record>& records, Form form, Document& document) {
  for (const Record& record : records) {
    document.lines.push_back(row(record, form));
  }
}

size_t place_at(double depth, size_t count) {
  return static_cast<size_t>(std::lround(depth * static_cast<double>(count - 1)));
}

void ask_field(const Record& record, Dice& dice, Document& document) {
  const Field field = dice.one_of(kAskable);
  document.asked = fmt::format("What is the {} of order {}?", kFieldNames[field], record[kOrderId]);
  document.expected = record[field];
  document.items = {document.expected};
}

void expect_items(Document& document) {
  document.expected = fmt::format("{}", fmt::join(document.items, "\n"));
  document.ordered = false;
}

Document needle(std::vector<Record> records, Form form, double depth, Dice& dice) {
  Document document;
  add_rows(records, form, document);
  ask_field(records[place_at(depth, records.size())], dice, document);
  return document;
}

// Up to 40 of the other records get ids that are one digit away.
Document multikey(std::vector<Record> records, Form form, double depth, Dice& dice) {
  const size_t asked = place_at(depth, records.size());
  std::set<std::string> ids;
  for (const Record& record : records) {
    ids.insert(record[kOrderId]);
  }
  const int count = static_cast<int>(records.size());
  for (const int i : dice.sample(count, std::min(40, count / 2))) {
    std::string twin = records[asked][kOrderId];
    const int digit = dice.below(static_cast<int>(twin.size()));
    twin[static_cast<size_t>(digit)] = static_cast<char>('0' + dice.between(digit == 0 ? 1 : 0, 9));
    if (static_cast<size_t>(i) != asked && ids.insert(twin).second) {
      records[static_cast<size_t>(i)][kOrderId] = twin;
    }
  }
  return needle(std::move(records), form, depth, dice);
}

Document multivalue(std::vector<Record> records, Form form, Dice& dice) {
  std::vector<int> places =
      dice.sample(static_cast<int>(records.size()), std::min<int>(kSeveral, static_cast<int>(records.size())));
  std::sort(places.begin(), places.end());
  Document document;
  const std::string id = records[static_cast<size_t>(places[0])][kOrderId];
  for (const int i : places) {
    Record& record = records[static_cast<size_t>(i)];
    record[kOrderId] = id;
    document.items.push_back(record[kCode]);
  }
  add_rows(records, form, document);
  document.asked = fmt::format("What are the {} codes of order {}?", places.size(), id);
  expect_items(document);
  return document;
}

Document multiquery(const std::vector<Record>& records, const Frame& frame, Dice& dice) {
  Document document;
  add_rows(records, frame.form, document);
  const Tool& tool = kTools[static_cast<size_t>(dice.one_of(frame.tools))];
  const int count = static_cast<int>(records.size());
  std::vector<std::string> ids;
  for (const int i : dice.sample(count, std::min(kSeveral, count))) {
    ids.push_back(records[static_cast<size_t>(i)][kOrderId]);
    document.items.push_back(call(tool, records[static_cast<size_t>(i)]));
  }
  document.asked = fmt::format("{}s {}.", tool.verb, fmt::join(ids, ", "));
  document.expected = fmt::format("{}", fmt::join(document.items, "\n"));
  return document;
}

// "VAR KAMI = 12345", later "VAR ROTEN = VAR KAMI", and so on, among the records.
Document variables(const std::vector<Record>& records, Form form, Dice& dice) {
  Document document;
  add_rows(records, form, document);
  const int value = dice.between(kLeastOrderId, kMostOrderId);
  while (static_cast<int>(document.items.size()) < kChain) {
    std::string name = lower_name(dice);
    std::transform(name.begin(), name.end(), name.begin(), [](char c) { return static_cast<char>(c - 'a' + 'A'); });
    if (std::find(document.items.begin(), document.items.end(), name) == document.items.end()) {
      document.items.push_back(std::move(name));
    }
  }
  std::vector<int> places(kChain);
  for (int& place : places) {
    place = dice.between(0, static_cast<int>(records.size()));
  }
  std::sort(places.begin(), places.end());
  for (size_t i = kChain; i-- > 0;) {  // from the back, so that the places before stay
    const std::string assigned = i == 0 ? fmt::format("{}", value) : "VAR " + document.items[i - 1];
    document.lines.insert(document.lines.begin() + places[i], fmt::format("VAR {} = {}", document.items[i], assigned));
  }
  document.asked = fmt::format("Find all {} variables that are assigned the value {}.", kChain, value);
  expect_items(document);
  return document;
}

// As in RULER up to 30 times each against 3; fewer in short lists.
Document common_words(int size, Dice& dice) {
  std::set<std::string> known;
  const auto new_word = [&] {
    std::string word = lower_name(dice);
    while (!known.insert(word).second) {
      word += lower_name(dice);
    }
    return word;
  };
  Document document;
  std::vector<std::string> words;
  const int often = std::clamp(size, 4, 30);
  for (int i = 0; i < kCommon; ++i) {
    document.items.push_back(new_word());
    words.insert(words.end(), static_cast<size_t>(often), document.items.back());
  }
  for (int i = 0; i < size; ++i) {
    words.insert(words.end(), 3, new_word());
  }
  for (size_t i = words.size(); i-- > 1;) {
    std::swap(words[i], words[static_cast<size_t>(dice.below(static_cast<int>(i) + 1))]);
  }
  for (size_t i = 0; i < words.size(); ++i) {
    document.lines.push_back(fmt::format("{}. {}", i + 1, words[i]));
  }
  document.asked = fmt::format("What are the {} most common words of the list?", kCommon);
  expect_items(document);
  return document;
}

// Rank k of [0, ranks) with weight 1 / (k + 1)^2.
int zipf_rank(int ranks, Dice& dice) {
  double whole = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    whole += 1.0 / ((rank + 1) * (rank + 1));
  }
  double left = dice.below(1'000'000) / 1e6 * whole;
  int rank = 0;
  for (; rank + 1 < ranks; ++rank) {
    left -= 1.0 / ((rank + 1) * (rank + 1));
    if (left < 0) {
      break;
    }
  }
  return rank;
}

// A city's rank is drawn; then records change cities until each of the three has more of them than any other.
Document frequent_words(std::vector<Record> records, Form form, Dice& dice) {
  constexpr int kRanks = 12;
  std::vector<std::string> cities;
  cities.reserve(kRanks);
  for (int i = 0; i < kRanks; ++i) {
    cities.push_back(capitalized(lower_name(dice)) + std::string(1, static_cast<char>('a' + i)));
  }
  std::vector<int> counts(kRanks);
  std::vector<int> rank_of;
  for (size_t i = 0; i < records.size(); ++i) {
    // Each of the three comes at least once.
    const int rank = i < kFrequent ? static_cast<int>(i) : zipf_rank(kRanks, dice);
    rank_of.push_back(rank);
    ++counts[static_cast<size_t>(rank)];
  }
  for (size_t i = 0; i < records.size(); ++i) {
    const int beyond = *std::max_element(counts.begin() + kFrequent, counts.end());
    const auto least = std::min_element(counts.begin(), counts.begin() + kFrequent);
    if (*least > beyond) {
      break;
    }
    if (rank_of[i] >= kFrequent) {
      --counts[static_cast<size_t>(rank_of[i])];
      rank_of[i] = static_cast<int>(least - counts.begin());
      ++*least;
    }
  }
  for (size_t i = 0; i < records.size(); ++i) {
    records[i][kCity] = cities[static_cast<size_t>(rank_of[i])];
  }
  Document document;
  add_rows(records, form, document);
  document.items.assign(cities.begin(), cities.begin() + kFrequent);
  document.asked = fmt::format("What are the {} most frequent cities of these orders?", kFrequent);
  expect_items(document);
  return document;
}

}  // namespace

LongRequest long_request(uint64_t seed, int size, LongTask task, double depth) {
  if (size < 1 || size > kMostLongSize) {
    throw Error("a document with {} records: ask for 1 to {}", size, kMostLongSize);
  }
  Dice facts(seed, Dice::Stream::records);
  Dice dice(seed, Dice::Stream::turn);
  const Frame frame = draw_frame(seed);
  std::vector<Record> records;
  if (task != LongTask::common_words) {
    records = draw_records(facts, task == LongTask::frequent_words ? std::max(size, kFrequent) : size);
  }
  const Document document = [&] {
    switch (task) {
      case LongTask::needle:
        return needle(std::move(records), frame.form, depth, dice);
      case LongTask::multikey:
        return multikey(std::move(records), frame.form, depth, dice);
      case LongTask::multivalue:
        return multivalue(std::move(records), frame.form, dice);
      case LongTask::multiquery:
        return multiquery(records, frame, dice);
      case LongTask::variables:
        return variables(records, frame.form, dice);
      case LongTask::common_words:
        return common_words(size, dice);
      case LongTask::frequent_words:
        return frequent_words(std::move(records), frame.form, dice);
    }
    return Document{};
  }();
  std::string prompt = frame.text;
  for (const std::string& line : document.lines) {
    prompt += line + "\n";
  }
  return {prompt + document.asked + "<|end|>\n<|assistant|>\n", document.expected, document.items, document.ordered};
}

LongRequest long_request_near(uint64_t seed, LongTask task, double depth, int target_tokens,
                              const std::function<int(std::string_view)>& count_tokens) {
  const auto tokens_at = [&](int size) { return count_tokens(long_request(seed, size, task, depth).prompt); };
  return long_request(seed, largest_size(kMostLongSize, target_tokens, "record or word", tokens_at), task, depth);
}

}  // namespace vericache
