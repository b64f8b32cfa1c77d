// Eval measurement: one workload with every compressor, in figures.
// Drives engines and trials; main thread.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "engine/options.h"
#include "eval_tasks.h"
#include "model_session.h"

namespace vericache {

inline constexpr std::array<int, 4> kEvalHorizons = {4, 16, 64, 128};

// Answers of one way to decode.
struct Answers {
  int right = 0;
  double items = 0;  // summed shares
};

struct EvalCell {
  std::string workload;
  int context = 0;
  float temperature = 0;
  std::string compressor;
  int prompts = 0;
  bool has_answers = false;

  // Teacher-forced over the full cache's text: tokens whose draft was the same, of so many.
  int64_t agreed = 0;
  int64_t judged = 0;
  std::array<int64_t, kEvalHorizons.size()> rounds{};  // that judging them would take at each horizon

  double resident_bytes = 0;  // after the prompts, in whole pages
  double resident_values = 0;

  Answers full;   // the full cache
  Answers alone;  // the compressed cache, nothing verified
  Answers verified;
  int alone_same = 0;               // texts of the compressed cache alone that are those of the full one
  double distinct_8gram_share = 0;  // of the full cache's texts

  EngineStats stats;  // of the verified run
  int64_t tokens = 0;
  int64_t mismatches = 0;  // tokens or logits of the verified run that are not the full cache's
  std::string first_mismatch;

  double agreement() const;
  double tokens_per_round(size_t horizon) const;
  double resident_bits() const;
  // Of the values that crossed for verifications; none did: nullopt.
  std::optional<double> wire_bits(const KvShape& shape) const;
  std::optional<double> wire_bytes_per_accepted() const;
};

struct EvalPlan {
  std::vector<std::string> compressors;
  EngineOptions options;  // horizon among them
  size_t device_memory = 0;
  Sampling sampling;  // prompt i samples with seed + i
};

// Rows that the kernels must take for it.
constexpr int kEvalBatch = 32;

// All compressors over one set. `show` is told what is under way.
std::vector<EvalCell> measure_eval(const EvalPlan& plan, const EvalSet& set, ModelSession& session,
                                   const std::function<void(std::string_view)>& show);

}  // namespace vericache
