// `--compressor auto`: what it stands for, found by a probe on the first prompts before an engine is built.
// Main thread.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/token.h"
#include "flags.h"
#include "model_session.h"

namespace vericache {

bool is_auto(std::string_view compressor);

// Sequences and rows of one pass that the session's kernels must take: those of the options, and the probe's.
int sequences_with_probe(const EngineOptions& options, std::string_view compressor);
int rows_with_probe(const EngineOptions& options, std::string_view compressor);

struct ChosenPolicy {
  std::string compressor;
  int horizon = 0;
  std::string reason;  // one line; empty where nothing had to be chosen
};

// The policy as it was asked for, with "auto" replaced. `options` as the engine will have them, max_sequences as many
// as are wanted. The reason goes to stderr too.
ChosenPolicy choose_policy(ModelSession& session, const EngineOptions& options, size_t device_memory,
                           const PolicyFlags& asked, std::span<const std::vector<TokenId>> prompts,
                           const Sampling& sampling);

}  // namespace vericache
