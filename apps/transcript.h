// Transcript: what an engine said of one sequence, and the comparison of two of them, bit for bit.
// Used by the thread that drives the engine.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace vericache {

struct Transcript {
  SeqId id = 0;
  int prompt_tokens = 0;
  int prompt_done = 0;
  std::vector<DecidedToken> tokens;
  std::optional<FinishReason> finish;
  double submitted = 0;  // seconds, as now_seconds()
  double first_token = 0;
  double last_token = 0;

  std::vector<TokenId> ids() const;
  uint64_t hash() const;  // of every token and the logits behind it
  double prefill_tokens_per_second() const;
  double decode_tokens_per_second() const;  // of the tokens after the first; 0 for fewer than two
};

// Submits the request and writes what becomes of it into `transcript`, which must outlive the sequence.
void submit_recorded(Engine& engine, Request request, Transcript& transcript);

struct Mismatch {
  int index = 0;                         // of the generated token
  std::optional<DecidedToken> expected;  // none: this side had ended
  std::optional<DecidedToken> got;
};

struct Comparison {
  int64_t tokens = 0;      // of the expected side
  int64_t mismatches = 0;  // places where token or logit hash differ, or one side has ended
  std::optional<Mismatch> first;
  bool identical() const { return mismatches == 0; }
};

Comparison compare(const Transcript& expected, const Transcript& got);
std::string describe(const Mismatch& mismatch);

double per_round(const SequenceStats& stats);  // accepted tokens; 0 without rounds
nlohmann::ordered_json speculation_json(const SequenceStats& stats);
nlohmann::ordered_json memory_json(const EngineStats& stats);
size_t pool_bytes(const EngineStats& stats);  // all that the engine took at start, weights not counted

}  // namespace vericache
