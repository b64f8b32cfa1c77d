#include "text/records.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "base/error.h"

namespace vericache {
namespace {

enum Field : int { kOrderId, kCustomer, kEmail, kCity, kAmount, kStatus, kCode, kFields };
constexpr std::array<std::string_view, kFields> kFieldNames = {"order_id", "customer", "email", "city",
                                                               "amount",   "status",   "code"};
using Record = std::array<std::string, kFields>;

constexpr std::array<std::string_view, 34> kSyllables = {
    "ka", "mi",  "ro",  "ten", "va", "lu", "shi", "or",  "en",  "da", "bel", "tor", "ni", "sa", "gre", "mon", "ul",
    "fa", "rin", "kel", "os",  "ta", "pe", "wi",  "zan", "dor", "el", "ha",  "jo",  "by", "ce", "qua", "ist", "um"};
constexpr std::array<std::string_view, 20> kCities = {"Oslo",  "Lima",  "Kyoto", "Porto", "Turin", "Basel", "Quito",
                                                      "Perth", "Delft", "Ghent", "Malmo", "Busan", "Hanoi", "Cairo",
                                                      "Tunis", "Accra", "Leeds", "Omaha", "Boise", "Tampa"};
constexpr std::array<std::string_view, 6> kStatuses = {"shipped", "pending", "paid", "refunded", "lost", "held"};

struct Tool {
  std::string_view name;
  std::string_view verb;  // with an s it asks for several
  std::array<Field, 3> parameters;
  int parameter_count;
  std::span<const Field> fields() const { return {parameters.data(), static_cast<size_t>(parameter_count)}; }
};
constexpr std::array<Tool, 5> kTools = {{
    {"refund_order", "Refund order", {kOrderId, kEmail, kAmount}, 3},
    {"ship_order", "Ship order", {kOrderId, kCity, kCustomer}, 3},
    {"notify_customer", "Notify the customer of order", {kEmail, kStatus, kFields}, 2},
    {"update_record", "Update the record of order", {kOrderId, kStatus, kCode}, 3},
    {"open_ticket", "Open a ticket for order", {kCustomer, kOrderId, kCode}, 3},
}};

// The standard fixes the engine's numbers but not its distributions: the mapping to a range is our own.
class Dice {
 public:
  // Streams of one seed are independent, so that more records do not change the tools or the form.
  enum class Stream : uint64_t { frame = 1, records = 2, turn = 3 };
  Dice(uint64_t seed, Stream stream) : numbers_(mix(seed + static_cast<uint64_t>(stream) * 0x9E3779B97F4A7C15u)) {}

  // Uniform in [0, n), to within n / 2^32.
  int below(int n) { return static_cast<int>(((numbers_() >> 32) * static_cast<uint64_t>(n)) >> 32); }
  int between(int least, int most) { return least + below(most - least + 1); }

  template <typename Values>
  const auto& one_of(const Values& values) {
    return values[static_cast<size_t>(below(static_cast<int>(values.size())))];
  }

  // `count` different numbers of [0, n), in random order.
  std::vector<int> sample(int n, int count) {
    std::vector<int> all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), 0);
    for (int i = 0; i < count; ++i) {
      std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(between(i, n - 1))]);
    }
    all.resize(static_cast<size_t>(count));
    return all;
  }

 private:
  static uint64_t mix(uint64_t x) {  // splitmix64's finisher (Steele et al. 2014): neighbouring seeds become unlike
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  std::mt19937_64 numbers_;
};

std::string lower_name(Dice& dice) {
  std::string name;
  for (int left = dice.between(2, 3); left > 0; --left) {
    name += dice.one_of(kSyllables);
  }
  return name;
}

std::string capitalized(std::string name) {
  name[0] = static_cast<char>(name[0] - 'a' + 'A');
  return name;
}

// As Python prints a number rounded to cents: "12.0", "12.5", "12.34".
std::string amount_text(int cents) {
  return cents % 10 == 0 ? fmt::format("{}.{}", cents / 100, cents / 10 % 10)
                         : fmt::format("{}.{:02}", cents / 100, cents % 100);
}

std::vector<Record> draw_records(Dice& dice, int count) {
  constexpr int kLeastId = 10'000;
  constexpr int kMostId = 99'999;
  std::vector<bool> used(kMostId + 1);
  std::vector<Record> records(static_cast<size_t>(count));
  for (Record& record : records) {
    int id = dice.between(kLeastId, kMostId);
    while (used[static_cast<size_t>(id)]) {
      id = dice.between(kLeastId, kMostId);
    }
    used[static_cast<size_t>(id)] = true;
    const std::string first = lower_name(dice);
    const std::string last = lower_name(dice);
    const std::string company = lower_name(dice);
    record[kOrderId] = fmt::format("{}", id);
    record[kCustomer] = capitalized(first) + " " + capitalized(last);
    record[kEmail] = fmt::format("{}.{}@{}.example", first, last, company);
    record[kCity] = dice.one_of(kCities);
    record[kAmount] = amount_text(dice.between(1'00, 999'00));
    record[kStatus] = dice.one_of(kStatuses);
    for (int digit = 0; digit < 8; ++digit) {
      record[kCode] += "0123456789abcdef"[dice.below(16)];
    }
  }
  return records;
}

// No value holds a character that JSON escapes, and only the amount is a number.
std::string json_object(const Record& record, std::span<const Field> fields) {
  std::string out = "{";
  for (const Field field : fields) {
    const std::string_view quote = field == kAmount ? "" : "\"";
    out += fmt::format("{}\"{}\": {}{}{}", out.size() > 1 ? ", " : "", kFieldNames[field], quote, record[field], quote);
  }
  return out + "}";
}

enum class Form { text, json, csv };

std::string row(const Record& record, Form form) {
  if (form == Form::text) {
    return fmt::format("order {}: customer={} email={} city={} amount={} status={} code={}", record[kOrderId],
                       record[kCustomer], record[kEmail], record[kCity], record[kAmount], record[kStatus],
                       record[kCode]);
  }
  if (form == Form::csv) {
    return fmt::format("{}", fmt::join(record, ","));
  }
  constexpr std::array<Field, kFields> kAll = {kOrderId, kCustomer, kEmail, kCity, kAmount, kStatus, kCode};
  return json_object(record, kAll);
}

std::string call(const Tool& tool, const Record& record) {
  return fmt::format("{{\"name\": \"{}\", \"arguments\": {}}}", tool.name, json_object(record, tool.fields()));
}

std::string declaration(const Tool& tool) {
  std::string parameters;
  for (const Field field : tool.fields()) {
    parameters += fmt::format("{}\"{}\"", parameters.empty() ? "" : ", ", kFieldNames[field]);
  }
  return fmt::format("{{\"name\": \"{}\", \"parameters\": [{}]}}", tool.name, parameters);
}

struct Turn {
  std::string asked;
  std::string expected;
};

Turn calls_turn(const std::vector<Record>& records, const Tool& tool, Dice& dice) {
  const int count = static_cast<int>(records.size());
  Turn turn;
  std::string ids;
  for (const int i : dice.sample(count, std::min(count, 12))) {
    const Record& record = records[static_cast<size_t>(i)];
    ids += (ids.empty() ? "" : ", ") + record[kOrderId];
    turn.expected += (turn.expected.empty() ? "" : "\n") + call(tool, record);
  }
  turn.asked = fmt::format("{}s {}.", tool.verb, ids);
  return turn;
}

Turn export_turn(const std::vector<Record>& records, Dice& dice) {
  const int count = static_cast<int>(records.size());
  const int exported = std::min(count, 14);
  const int first = dice.between(0, count - exported);
  Turn turn;
  for (int i = first; i < first + exported; ++i) {
    turn.expected += (turn.expected.empty() ? "" : "\n") + row(records[static_cast<size_t>(i)], Form::json);
  }
  turn.asked = fmt::format("List the {} records from order {} as JSON.", exported,
                           records[static_cast<size_t>(first)][kOrderId]);
  return turn;
}

Turn question_turn(const std::vector<Record>& records, Dice& dice) {
  constexpr std::array<Field, 6> kAskable = {kEmail, kCity, kAmount, kStatus, kCode, kCustomer};
  const Record& record = dice.one_of(records);
  const Field field = dice.one_of(kAskable);
  return {fmt::format("What is the {} of order {}?", kFieldNames[field], record[kOrderId]), record[field]};
}

}  // namespace

RecordsRequest records_request(uint64_t seed, int records, RecordsTask task) {
  if (records < 1 || records > kMostRecords) {
    throw Error("a records document with {} records: ask for 1 to {}", records, kMostRecords);
  }
  Dice frame(seed, Dice::Stream::frame);
  Dice facts(seed, Dice::Stream::records);
  Dice turns(seed, Dice::Stream::turn);
  const std::vector<Record> drawn = draw_records(facts, records);

  const Form form = static_cast<Form>(frame.below(3));
  const int tools = frame.between(2, static_cast<int>(kTools.size()));
  const std::vector<int> declared = frame.sample(static_cast<int>(kTools.size()), tools);
  std::string prompt = "<|system|>\nTools:\n";
  for (const int tool : declared) {
    prompt += declaration(kTools[static_cast<size_t>(tool)]) + "\n";
  }
  prompt += "<|end|>\n<|user|>\n";
  if (form == Form::csv) {
    prompt += fmt::format("{}\n", fmt::join(kFieldNames, ","));
  }
  for (const Record& record : drawn) {
    prompt += row(record, form) + "\n";
  }

  Turn turn;
  switch (task) {
    case RecordsTask::calls:
      turn = calls_turn(drawn, kTools[static_cast<size_t>(turns.one_of(declared))], turns);
      break;
    case RecordsTask::export_json:
      turn = export_turn(drawn, turns);
      break;
    case RecordsTask::question:
      turn = question_turn(drawn, turns);
      break;
  }
  return {prompt + turn.asked + "<|end|>\n<|assistant|>\n", turn.expected};
}

RecordsRequest records_request_near(uint64_t seed, RecordsTask task, int target_tokens,
                                    const std::function<int(std::string_view)>& count_tokens) {
  RecordsRequest fits = records_request(seed, 1, task);
  int records = 1;  // the most known to fit
  double tokens = count_tokens(fits.prompt);
  if (tokens > target_tokens) {
    throw Error("a records document of {} tokens: one record alone takes {}; ask for more tokens", target_tokens,
                tokens);
  }
  int beyond = kMostRecords + 1;  // the least known not to fit
  double beyond_tokens = 0;
  for (int step = 0; beyond - records > 1; ++step) {
    // Length is nearly linear in records: aim at the target; now and then double or halve, so that the search ends for
    // any count.
    const bool bracketed = beyond_tokens > 0;
    double aim = 0;
    if (step % 4 == 3) {
      aim = bracketed ? (records + beyond) / 2.0 : records * 2.0;
    } else if (bracketed) {
      aim = records + (beyond - records) * (target_tokens - tokens) / (beyond_tokens - tokens);
    } else {
      aim = records * (target_tokens / std::max(tokens, 1.0)) + 1;
    }
    const int next = static_cast<int>(std::clamp<double>(aim, records + 1, beyond - 1));
    RecordsRequest candidate = records_request(seed, next, task);
    const double count = count_tokens(candidate.prompt);
    if (count <= target_tokens) {
      fits = std::move(candidate);
      records = next;
      tokens = count;
    } else {
      beyond = next;
      beyond_tokens = count;
    }
  }
  return fits;
}

}  // namespace vericache
