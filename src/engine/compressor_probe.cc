#include "engine/compressor_probe.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "backend/copy_rate.h"
#include "base/error.h"
#include "compress/compressor.h"
#include "engine/cache_trial.h"
#include "engine/memory_plan.h"
#include "kv/tail.h"

namespace vericache {
namespace {

constexpr int kVerifiedRows = 16;  // of the exact passes that are timed beside those of one row
constexpr int kLeastPrompt = 64;   // tokens of a prompt that are worth a probe

// What one sequence takes and what there is however many run, as plan_memory cuts it.
void plan_candidate(const Transformer& model, const EngineOptions& options, const Device& device,
                    CompressorCandidate& candidate, std::string& refusal) {
  EngineOptions one = options;
  one.max_sequences = 1;
  one.horizon = candidate.drafts ? options.horizon : 0;
  const std::unique_ptr<Compressor> compressor = make_compressor(candidate.name);
  const KvShape shape = model.kv_shape();
  try {
    const MemoryPlan plan = plan_memory(model, compressor.get(), one, device);
    const size_t tail = static_cast<size_t>(plan.decode_sets) * page_set_bytes(shape);
    candidate.sequence_bytes =
        tail + plan.resident_bytes + plan.query_window_bytes + plan.sequence_notes_bytes(shape) + plan.index_bytes;
    candidate.fixed_bytes = plan.activation_bytes + plan.scratch_bytes + plan.rounding_bytes + plan.staging_bytes +
                            std::max(plan.tail_bytes, tail) - tail;
    candidate.stored_sequences = sequences_stored(plan, options, shape);
    if (plan.streaming) {
      candidate.wire_bytes = static_cast<size_t>(plan.max_len / kPageTokens) * page_set_bytes(shape);
    }
  } catch (const Error& error) {
    candidate.fixed_bytes = std::numeric_limits<size_t>::max();  // not even one sequence fits
    refusal = error.what();
  }
}

// Bytes a second of the host's memory coming in, by the lane that will bring it; 0 where the device has no room for
// that.
double measured_wire(Device& device, Kernels& kernels) {
  constexpr size_t kBlock = size_t{1} << 20;
  constexpr size_t kMostBlocks = 16;
  constexpr int kTimes = 4;
  const size_t blocks = std::min(kMostBlocks, device.available() / kBlock);
  if (blocks == 0) {
    return 0;
  }
  const std::unique_ptr<Device> host = device.make_host_memory(blocks * kBlock + 4096);
  std::byte* from = host->allocate(blocks * kBlock, "the block that measures the wire");
  std::byte* to = device.allocate(blocks * kBlock, "the block that measures the wire");
  while (host->ready(from, blocks * kBlock) < blocks * kBlock) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::vector<BlockCopy> copies;
  for (size_t i = 0; i < blocks; ++i) {
    copies.push_back({to + i * kBlock, from + i * kBlock, kBlock});
  }
  return copy_rate(kernels.lane(Kernels::Place::wire_in), copies, kTimes);
}

// Bytes a second of reading device memory, seen in a copy within it; 0 where it has no room for one that no cache
// holds.
double measured_reading(Device& device, Kernels& kernels) {
  constexpr size_t kLeast = size_t{64} << 20;
  constexpr size_t kMost = size_t{256} << 20;
  constexpr int kTimes = 3;
  const size_t bytes = std::min(kMost, device.available() / 4 / 4096 * 4096);
  if (bytes < kLeast) {
    return 0;
  }
  std::byte* from = device.allocate(2 * bytes, "the blocks that measure device memory");
  const BlockCopy copy{from + bytes, from, bytes};
  return 2 * copy_rate(kernels.lane(Kernels::Place::pass), {&copy, 1}, kTimes);
}

// A trial over the end of the longest prompt: as much of it as the memory holds beside all that the candidates keep.
struct OpenTrial {
  std::unique_ptr<Device> device;
  std::unique_ptr<CacheTrial> trial;
  int prompt_tokens = 0;
};
OpenTrial open_trial(const Transformer& model, const EngineOptions& options, const ProbeRequest& request,
                     std::span<const CompressorCandidate> drafting, int most_tokens, int scored,
                     const std::function<std::unique_ptr<Device>()>& open_device) {
  for (int tokens = most_tokens;; tokens /= 2) {
    OpenTrial open;
    try {
      open.device = open_device();
      open.prompt_tokens = tokens;
      std::vector<std::unique_ptr<Compressor>> compressors;
      for (const CompressorCandidate& candidate : drafting) {
        compressors.push_back(make_compressor(candidate.name));
      }
      open.trial = std::make_unique<CacheTrial>(
          model, *open.device, std::move(compressors),
          TrialLimits{.max_tokens = tokens + scored + 1, .pass_rows = options.pass_rows, .batch = request.batch});
      return open;
    } catch (const Error&) {
      if (tokens / 2 < kLeastPrompt) {
        throw;
      }
    }
  }
}

void score(CacheTrial& trial, std::span<const TokenId> prompt, const ProbeRequest& request, int scored,
           std::span<CompressorCandidate> drafting) {
  const TokenId first = trial.read(prompt, request.sampling);
  const std::vector<TokenId> text = trial.exact(first, scored + 1, {});
  trial.verified(text, kVerifiedRows);
  for (size_t i = 0; i < drafting.size(); ++i) {
    const std::vector<TokenId> choices = trial.forced(i, text);
    for (size_t k = 0; k < choices.size(); ++k) {
      drafting[i].agreed += choices[k] == text[k + 1] ? 1 : 0;
      drafting[i].judged += 1;
    }
    trial.alone(i, first, std::min(scored, 4) + 1, {});  // steps of one row: what the weights cost beside the rows
    drafting[i].draft_base = trial.draft_cost(i).base();
    drafting[i].draft_row = trial.draft_cost(i).per_row();
  }
}

}  // namespace

std::vector<std::string> probe_candidates() {
  return {"none",          "kivi:bits=8",       "kivi:bits=4",
          "quarot:bits=4", "quarot:bits=3",     "quarot:k=4,v=2",
          "quarot:bits=2", "snapkv:budget=0.2", "snapkv:budget=0.2+kivi:bits=4"};
}

ProbeReport probe_compressors(const Transformer& model, const EngineOptions& options, const ProbeRequest& request,
                              const std::function<std::unique_ptr<Device>()>& open_device) {
  ProbeReport report;
  std::string refusal;
  int longest = 0;
  double mean_tokens = request.tokens / 2.0;
  for (const std::vector<TokenId>& prompt : request.prompts) {
    longest = std::max(longest, static_cast<int>(prompt.size()));
    mean_tokens += static_cast<double>(prompt.size()) / static_cast<double>(request.prompts.size());
  }
  double reading = 0;
  const bool fixed_horizon = options.horizon != EngineOptions::kAdaptive;
  DecodingCircumstances& here = report.circumstances;
  here.sequences = options.max_sequences;
  here.least_horizon = fixed_horizon ? options.horizon : 1;
  here.most_horizon = fixed_horizon ? options.horizon : options.max_horizon;
  {
    const std::unique_ptr<Device> device = open_device();
    here.device_bytes = device->available();
    for (const std::string& spec : request.candidates) {
      CompressorCandidate candidate{.name = spec, .drafts = spec != "none"};
      candidate.wire_bytes = make_compressor(spec)->wire_bytes(static_cast<int>(mean_tokens), model.kv_shape());
      plan_candidate(model, options, *device, candidate, refusal);
      report.candidates.push_back(std::move(candidate));
    }
    const double cap = options.wire_gbps * 1e9;
    reading = measured_reading(*device, model.kernels());
    const double measured = measured_wire(*device, model.kernels());
    here.wire_bytes_per_second = cap > 0 && measured > 0 ? std::min(cap, measured) : std::max(cap, measured);
  }
  // Those that cannot run are not worth the time; the full cache agrees with itself.
  const auto runs = [](const CompressorCandidate& c) { return c.fixed_bytes < std::numeric_limits<size_t>::max(); };
  const auto first_idle = std::stable_partition(report.candidates.begin(), report.candidates.end(),
                                                [&](const CompressorCandidate& c) { return runs(c) && c.drafts; });
  const std::span<CompressorCandidate> drafting(report.candidates.begin(), first_idle);
  std::string shortened;
  if (const bool any = std::any_of(report.candidates.begin(), report.candidates.end(), runs); any && longest > 0) {
    const int max_len = options.max_model_len > 0 ? options.max_model_len : model.config().max_position;
    const int scored = std::clamp(max_len / 2, 1, request.tokens);
    const int most_tokens = std::clamp(max_len - scored - 1, 1, longest);
    const OpenTrial open = open_trial(model, options, request, drafting, most_tokens, scored, open_device);
    for (const std::vector<TokenId>& prompt : request.prompts) {
      const size_t tokens = std::min(prompt.size(), static_cast<size_t>(open.prompt_tokens));
      score(*open.trial, std::span(prompt).last(tokens), request, scored, drafting);
    }
    const ContextStretch stretch{mean_tokens, static_cast<double>(open.prompt_tokens), reading};
    const KvShape shape = model.kv_shape();
    for (CompressorCandidate& candidate : drafting) {
      const size_t resident = make_compressor(candidate.name)->resident_bytes(static_cast<int>(mean_tokens), shape);
      candidate.draft_row = stretch.draft_row(candidate.draft_row, static_cast<double>(resident));
    }
    const double token_bytes = static_cast<double>(page_set_bytes(shape)) / kPageTokens;
    here.verify_base = stretch.verify_base(open.trial->exact_cost().base(), token_bytes);
    here.verify_row = open.trial->exact_cost().per_row();
    if (open.prompt_tokens < most_tokens) {
      shortened =
          fmt::format(" (probed on the last {} of {} prompt tokens: more does not fit)", open.prompt_tokens, longest);
    }
  }
  report.choice = choose_compressor(report.candidates, here);
  if (report.choice.winner < 0) {
    throw Error("no compressor of {} can decode here: {}", report.candidates.size(), refusal);
  }
  report.line = report.choice.reason + shortened;
  return report;
}

}  // namespace vericache
