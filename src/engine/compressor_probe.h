// The probe behind `--compressor auto`: measures on the first requests how far drafts of each candidate agree, what
// draft steps, exact passes and the wire cost here, and lets choose_compressor decide. Before an engine is built, since
// that has one compressor for its life; on the thread that will drive it.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/device.h"
#include "backend/sampling.h"
#include "base/token.h"
#include "engine/options.h"
#include "model/transformer.h"
#include "speculate/compressor_choice.h"

namespace vericache {

// Candidates where the caller names none, as make_compressor reads them; "none", the full cache, among them.
std::vector<std::string> probe_candidates();

struct ProbeRequest {
  std::vector<std::string> candidates = probe_candidates();
  std::vector<std::vector<TokenId>> prompts;  // one or two are plenty; each is read once
  Sampling sampling;
  int tokens = 128;  // scored after each prompt
  int batch = 32;    // scored at once; the kernels' sequences at most
};

struct ProbeReport {
  std::vector<CompressorCandidate> candidates;
  DecodingCircumstances circumstances;
  CompressorChoice choice;  // its winner is an index of candidates
  std::string line;         // for people: what was chosen, and why
};

// `options` as the engine will have them, with max_sequences as many as are wanted. `open_device` gives the memory that
// the engine's pools will have, empty; the probe takes it and gives it back. Where that does not hold the full KV of a
// prompt, the probe reads only the end of it. Error if no candidate leaves room for one sequence.
ProbeReport probe_compressors(const Transformer& model, const EngineOptions& options, const ProbeRequest& request,
                              const std::function<std::unique_ptr<Device>()>& open_device);

}  // namespace vericache
