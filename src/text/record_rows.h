// Rows of records, tools and the dice that they are drawn with: the vocabulary that every synthetic document shares.
// Pure: the same seed draws the same on every platform. Safe from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vericache::records {

enum Field : int { kOrderId, kCustomer, kEmail, kCity, kAmount, kStatus, kCode, kFields };
constexpr std::array<std::string_view, kFields> kFieldNames = {"order_id", "customer", "email", "city",
                                                               "amount",   "status",   "code"};
using Record = std::array<std::string, kFields>;

struct Tool {
  std::string_view name;
  std::string_view verb;  // with an s it asks for several
  std::array<Field, 3> parameters;
  int parameter_count;
  std::span<const Field> fields() const { return {parameters.data(), static_cast<size_t>(parameter_count)}; }
};
extern const std::array<Tool, 5> kTools;

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

enum class Form { text, json, csv };

std::string lower_name(Dice& dice);
std::string capitalized(std::string name);
// A record whose order id is `id`; everything else is drawn.
Record draw_record(Dice& dice, int id);
// Order ids have five digits.
constexpr int kLeastOrderId = 10'000;
constexpr int kMostOrderId = 99'999;
// Records with different order ids.
std::vector<Record> draw_records(Dice& dice, int count);

// No value holds a character that JSON escapes, and only the amount is a number.
std::string json_object(const Record& record, std::span<const Field> fields);
std::string row(const Record& record, Form form);
std::string call(const Tool& tool, const Record& record);

// What stands before the records of a document, and how they are written: drawn from the frame's own dice.
struct Frame {
  Form form = Form::text;
  std::vector<int> tools;  // indices of kTools that are declared
  std::string text;        // "<|system|>...<|user|>\n" and the head line of CSV
};
Frame draw_frame(uint64_t seed);

// The largest size from 1 to `most` at which a document has at most `target_tokens`, which is more than `tokens_at`'s
// document has at one size less: its length grows nearly linearly. About ten calls of tokens_at, at worst a few dozen.
// Error if size 1 is more than the target; `what` names what one of them is.
int largest_size(int most, int target_tokens, std::string_view what, const std::function<int(int)>& tokens_at);

}  // namespace vericache::records
