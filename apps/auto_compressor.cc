#include "auto_compressor.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/compressor_probe.h"

namespace vericache {
namespace {

constexpr size_t kPrompts = 2;

}  // namespace

bool is_auto(std::string_view compressor) {
  return compressor == "auto";
}

int sequences_with_probe(const EngineOptions& options, std::string_view compressor) {
  return is_auto(compressor) ? std::max(options.max_sequences, ProbeRequest{}.batch) : options.max_sequences;
}

int rows_with_probe(const EngineOptions& options, std::string_view compressor) {
  return is_auto(compressor) ? std::max(most_rows(options), ProbeRequest{}.batch) : most_rows(options);
}

ChosenPolicy choose_policy(ModelSession& session, const EngineOptions& options, size_t device_memory,
                           const PolicyFlags& asked, std::span<const std::vector<TokenId>> prompts,
                           const Sampling& sampling) {
  const int horizon = horizon_for(asked.horizon, asked.compressor);
  if (!is_auto(asked.compressor)) {
    return {asked.compressor, horizon, ""};
  }
  ProbeRequest request;
  const auto some = prompts.first(std::min(prompts.size(), kPrompts));
  request.prompts.assign(some.begin(), some.end());
  request.sampling = sampling;
  EngineOptions engine = options;
  engine.horizon = horizon;
  const ProbeReport report = probe_compressors(session.transformer(), engine, request,
                                               [&] { return open_pool_device(session, device_memory); });
  fmt::print(stderr, "compressor auto: {}\n", report.line);
  const CompressorCandidate& chosen = report.candidates[static_cast<size_t>(report.choice.winner)];
  return {chosen.name, chosen.drafts ? horizon : 0, report.line};
}

}  // namespace vericache
