// The choice of a compressor: which of several promises the most tokens a second, from what was measured of them.
// Pure: numbers in, numbers out; any thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace vericache {

// One way to decode, as it was measured.
struct CompressorCandidate {
  std::string name;
  bool drafts = true;         // else every token is a pass over the full KV
  size_t fixed_bytes = 0;     // of device memory, however many sequences there are; it has to hold one at least
  size_t sequence_bytes = 0;  // of device memory, of one sequence: its resident KV first of all
  size_t wire_bytes = 0;      // that one verification of one sequence brings in
  // Whose full KV there is room for outside the device.
  int stored_sequences = std::numeric_limits<int>::max();
  double agreed = 0;      // draft tokens that were the exact ones
  double judged = 0;      // of so many
  double draft_base = 0;  // seconds of a draft step of n sequences: base + n * row
  double draft_row = 0;
};

struct DecodingCircumstances {
  size_t device_bytes = 0;           // left beside the weights
  double wire_bytes_per_second = 0;  // 0 = nothing has to be waited for
  double verify_base = 0;            // seconds of an exact pass of n rows: base + n * row
  double verify_row = 0;
  int sequences = 1;      // wanted in flight
  int least_horizon = 1;  // the same twice = a fixed horizon
  int most_horizon = 64;
};

enum class DecodingBound { memory, draft, wire, verify };

struct CompressorForecast {
  double tokens_per_second = 0;                 // 0 = not even one sequence fits
  int sequences = 0;                            // that fit, of those that are wanted
  int horizon = 0;                              // at which it is best; 0 = it does not draft
  double agreement = 0;                         // expected of the next draft token
  DecodingBound bound = DecodingBound::memory;  // what takes most of its time
};

struct CompressorChoice {
  int winner = -1;                            // -1 = nothing fits
  std::vector<CompressorForecast> forecasts;  // one for each candidate
  std::string reason;                         // one line
};

// From costs that were measured of a context of `probed` tokens, where all rows of a step read one cache, to those of
// `tokens` tokens, where each row reads its own: that takes as much longer as the context is longer, and no less than
// reading it does.
struct ContextStretch {
  double tokens = 0;
  double probed = 0;            // not 0
  double bytes_per_second = 0;  // of reading device memory; 0: not known

  double seconds(double bytes) const { return bytes_per_second > 0 ? bytes / bytes_per_second : 0; }
  double draft_row(double measured, double resident_bytes) const {
    return std::max(measured * std::max(tokens / probed, 1.0), seconds(resident_bytes));
  }
  double verify_base(double measured, double full_bytes_per_token) const {
    return measured + seconds(std::max(tokens - probed, 0.0) * full_bytes_per_token);
  }
};

// Few judged tokens say little: agreement is taken as if one more had agreed and one more not.
CompressorForecast forecast(const CompressorCandidate& candidate, const DecodingCircumstances& circumstances);

// The candidate of the best forecast; the earlier one where two are equal.
CompressorChoice choose_compressor(std::span<const CompressorCandidate> candidates,
                                   const DecodingCircumstances& circumstances);

}  // namespace vericache
