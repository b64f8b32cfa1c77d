#include "text/record_rows.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"

namespace vericache::records {
namespace {

constexpr std::array<std::string_view, 34> kSyllables = {
    "ka", "mi",  "ro",  "ten", "va", "lu", "shi", "or",  "en",  "da", "bel", "tor", "ni", "sa", "gre", "mon", "ul",
    "fa", "rin", "kel", "os",  "ta", "pe", "wi",  "zan", "dor", "el", "ha",  "jo",  "by", "ce", "qua", "ist", "um"};
constexpr std::array<std::string_view, 20> kCities = {"Oslo",  "Lima",  "Kyoto", "Porto", "Turin", "Basel", "Quito",
                                                      "Perth", "Delft", "Ghent", "Malmo", "Busan", "Hanoi", "Cairo",
                                                      "Tunis", "Accra", "Leeds", "Omaha", "Boise", "Tampa"};
constexpr std::array<std::string_view, 6> kStatuses = {"shipped", "pending", "paid", "refunded", "lost", "held"};

// As Python prints a number rounded to cents: "12.0", "12.5", "12.34".
std::string amount_text(int cents) {
  return cents % 10 == 0 ? fmt::format("{}.{}", cents / 100, cents / 10 % 10)
                         : fmt::format("{}.{:02}", cents / 100, cents % 100);
}

std::string declaration(const Tool& tool) {
  std::string parameters;
  for (const Field field : tool.fields()) {
    parameters += fmt::format("{}\"{}\"", parameters.empty() ? "" : ", ", kFieldNames[field]);
  }
  return fmt::format("{{\"name\": \"{}\", \"parameters\": [{}]}}", tool.name, parameters);
}

}  // namespace

constinit const std::array<Tool, 5> kTools = {{
    {"refund_order", "Refund order", {kOrderId, kEmail, kAmount}, 3},
    {"ship_order", "Ship order", {kOrderId, kCity, kCustomer}, 3},
    {"notify_customer", "Notify the customer of order", {kEmail, kStatus, kFields}, 2},
    {"update_record", "Update the record of order", {kOrderId, kStatus, kCode}, 3},
    {"open_ticket", "Open a ticket for order", {kCustomer, kOrderId, kCode}, 3},
}};

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

Record draw_record(Dice& dice, int id) {
  Record record;
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
  return record;
}

std::vector<Record> draw_records(Dice& dice, int count) {
  std::vector<bool> used(kMostOrderId + 1);
  std::vector<Record> records(static_cast<size_t>(count));
  for (Record& record : records) {
    int id = dice.between(kLeastOrderId, kMostOrderId);
    while (used[static_cast<size_t>(id)]) {
      id = dice.between(kLeastOrderId, kMostOrderId);
    }
    used[static_cast<size_t>(id)] = true;
    record = draw_record(dice, id);
  }
  return records;
}

std::string json_object(const Record& record, std::span<const Field> fields) {
  std::string out = "{";
  for (const Field field : fields) {
    const std::string_view quote = field == kAmount ? "" : "\"";
    out += fmt::format("{}\"{}\": {}{}{}", out.size() > 1 ? ", " : "", kFieldNames[field], quote, record[field], quote);
  }
  return out + "}";
}

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

Frame draw_frame(uint64_t seed) {
  Dice dice(seed, Dice::Stream::frame);
  Frame frame;
  frame.form = static_cast<Form>(dice.below(3));
  const int tools = dice.between(2, static_cast<int>(kTools.size()));
  frame.tools = dice.sample(static_cast<int>(kTools.size()), tools);
  frame.text = "<|system|>\nTools:\n";
  for (const int tool : frame.tools) {
    frame.text += declaration(kTools[static_cast<size_t>(tool)]) + "\n";
  }
  frame.text += "<|end|>\n<|user|>\n";
  if (frame.form == Form::csv) {
    frame.text += fmt::format("{}\n", fmt::join(kFieldNames, ","));
  }
  return frame;
}

int largest_size(int most, int target_tokens, std::string_view what, const std::function<int(int)>& tokens_at) {
  int size = 1;  // the most known to fit
  double tokens = tokens_at(size);
  if (tokens > target_tokens) {
    throw Error("a records document of {} tokens: one {} alone takes {}; ask for more tokens", target_tokens, what,
                tokens);
  }
  int beyond = most + 1;  // the least known not to fit
  double beyond_tokens = 0;
  for (int step = 0; beyond - size > 1; ++step) {
    // Aim at the target; now and then double or halve, so that the search ends for any count.
    const bool bracketed = beyond_tokens > 0;
    double aim = 0;
    if (step % 4 == 3) {
      aim = bracketed ? (size + beyond) / 2.0 : size * 2.0;
    } else if (bracketed) {
      aim = size + (beyond - size) * (target_tokens - tokens) / (beyond_tokens - tokens);
    } else {
      aim = size * (target_tokens / std::max(tokens, 1.0)) + 1;
    }
    const int next = static_cast<int>(std::clamp<double>(aim, size + 1, beyond - 1));
    const double count = tokens_at(next);
    if (count <= target_tokens) {
      size = next;
      tokens = count;
    } else {
      beyond = next;
      beyond_tokens = count;
    }
  }
  return size;
}

}  // namespace vericache::records
