// Bench report: what was measured of each mode and context, and how it is told.
// Plain data and pure functions; any thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "transcript.h"

namespace vericache {

struct BenchSample {
  double prefill = 0;  // tokens/s, all sequences together
  double decode = 0;
  double wire_bytes_per_token = 0;
  double read_gbps = 0;
  double wire_share = 0;  // of the time in which something came in
  double wire_gbps = 0;   // while it did
  SequenceStats speculation;
  std::deque<Transcript> transcripts;
};

struct BenchResult {
  std::string mode;
  std::string compressor;
  int context = 0;
  int prompt_tokens = 0;
  int sequences = 0;      // in flight
  size_t peak_bytes = 0;  // of device memory: weights, kernels' own, pools
  std::vector<BenchSample> samples;
  std::optional<bool> identical;  // to the full mode of the same repeat
  double distinct_8gram_share = 0;
  bool full_on_device = false;
  size_t step_bytes = 0;    // that one step of its decoding (compressed: of its drafting) reads
  double read_ceiling = 0;  // GB/s of reading as many bytes again and again

  template <typename Value>
  std::vector<double> sorted(const Value& value) const {
    std::vector<double> values;
    values.reserve(samples.size());
    for (const BenchSample& sample : samples) {
      values.push_back(value(sample));
    }
    std::sort(values.begin(), values.end());
    return values;
  }
  template <typename Value>
  double median(const Value& value) const {
    const std::vector<double> values = sorted(value);
    const size_t middle = values.size() / 2;
    return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
  }
};

// `settings`: what was run, an object to which the results are added.
std::string bench_json(const nlohmann::ordered_json& settings, const std::vector<BenchResult>& results);
std::string bench_table(const std::vector<BenchResult>& results);

}  // namespace vericache
