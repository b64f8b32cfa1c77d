#include "text/records.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "text/record_rows.h"

namespace vericache {
namespace {

using namespace records;

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
  Dice facts(seed, Dice::Stream::records);
  Dice turns(seed, Dice::Stream::turn);
  const std::vector<Record> drawn = draw_records(facts, records);

  const Frame frame = draw_frame(seed);
  std::string prompt = frame.text;
  for (const Record& record : drawn) {
    prompt += row(record, frame.form) + "\n";
  }

  Turn turn;
  switch (task) {
    case RecordsTask::calls:
      turn = calls_turn(drawn, kTools[static_cast<size_t>(turns.one_of(frame.tools))], turns);
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
  const auto tokens_at = [&](int records) { return count_tokens(records_request(seed, records, task).prompt); };
  return records_request(seed, largest_size(kMostRecords, target_tokens, "record", tokens_at), task);
}

}  // namespace vericache
