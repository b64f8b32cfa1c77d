// Records: long tool-calling documents, the form that the bundled models were trained on, whose right answers are
// known. Pure: the same arguments give the same text on every platform. Safe from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace vericache {

enum class RecordsTask {
  calls,        // 12 tool calls whose arguments stand in the records
  export_json,  // 14 neighbouring records as JSON, one a line
  question,     // one field of one record
};

struct RecordsRequest {
  std::string prompt;    // system tools, records, one user turn; ends in "<|end|>\n<|assistant|>\n"
  std::string expected;  // the exact right answer, without the "<|end|>" that closes it
};

constexpr int kMostRecords = 50'000;

// The same seed with more records gives the same tools and the same form, and begins with the same records. `calls` and
// `export_json` ask for as many as there are if there are fewer than 12 or 14. Error unless 1 <= records <=
// kMostRecords.
RecordsRequest records_request(uint64_t seed, int records, RecordsTask task);

// The request whose prompt counts at most `target_tokens`, and more than that with one record more (unless it has
// kMostRecords). `count_tokens` is called about ten times (at worst a few dozen). Error if one record alone is more
// than the target.
RecordsRequest records_request_near(uint64_t seed, RecordsTask task, int target_tokens,
                                    const std::function<int(std::string_view)>& count_tokens);

}  // namespace vericache
