// Long tasks: the synthetic tasks of RULER in the form of the records documents, with their right answers.
// Pure: the same arguments give the same text on every platform. Safe from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace vericache {

// Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?", section 3. Retrieval
// is asked for as the bundled models learned it; the others are put as plainly as the document's form allows.
enum class LongTask {
  needle,          // one field of one record among many
  multikey,        // the same, among records whose ids differ from the asked one in a single digit
  multivalue,      // one order has four records: all four codes
  multiquery,      // tool calls for four orders
  variables,       // five variables share a value through a chain of assignments: all their names
  common_words,    // the ten words of a list that come more often than the others
  frequent_words,  // the three cities that most records have
};

struct LongRequest {
  std::string prompt;              // ends in "<|end|>\n<|assistant|>\n"
  std::string expected;            // the right answer as the document's form has it
  std::vector<std::string> items;  // what has to be in it
  bool ordered = true;             // the answer is right only as it is expected; else it is the items, in any order
};

constexpr int kMostLongSize = 50'000;

// A document of about `size` records (common_words: of 3 * size other words). depth in [0, 1]: where the asked record
// lies, 0 = first; what is asked of several records is spread over all. Error unless 1 <= size <= kMostLongSize.
LongRequest long_request(uint64_t seed, int size, LongTask task, double depth);

// The largest whose prompt counts at most `target_tokens`. Error if the smallest counts more.
LongRequest long_request_near(uint64_t seed, LongTask task, double depth, int target_tokens,
                              const std::function<int(std::string_view)>& count_tokens);

}  // namespace vericache
