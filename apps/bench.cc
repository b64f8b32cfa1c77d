#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "auto_compressor.h"
#include "base/error.h"
#include "bench_report.h"
#include "flags.h"
#include "kv/tail.h"
#include "model_session.h"
#include "prompts.h"
#include "read_ceiling.h"
#include "terminal.h"
#include "workload.h"

namespace vericache {
namespace {

constexpr int kMostSequences = 32;  // where as many as fit are wanted

struct BenchFlags {
  EngineFlags engine;
  PolicyFlags policy;
  Sampling sampling;
  std::vector<int> contexts = {512, 4096, 16384};
  std::string mode = "both";
  std::string workload = "records";
  std::string prompt_file;
  int steps = 128;
  int repeats = 3;
  int sequences = 1;  // 0: as many as fit
  bool json = false;
  std::string command_line;
};

// What one step of decoding reads: every matrix once, and the KV of every sequence.
struct StepBytes {
  double weights = 0;
  double full_kv = 0;      // of one sequence
  double resident_kv = 0;  // as the compressor holds it
};

StepBytes step_bytes(ModelSession& session, const Compressor* compressor, int tokens) {
  const ModelConfig& c = session.config();
  const Kernels& kernels = session.kernels();
  const size_t layer = kernels.packed_bytes((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden_size) +
                       kernels.packed_bytes(c.hidden_size, c.heads * c.head_dim) +
                       kernels.packed_bytes(2 * c.intermediate_size, c.hidden_size) +
                       kernels.packed_bytes(c.hidden_size, c.intermediate_size);
  StepBytes bytes;
  bytes.weights =
      static_cast<double>(layer * static_cast<size_t>(c.layers) + kernels.packed_bytes(c.vocab_size, c.hidden_size));
  bytes.full_kv = static_cast<double>(page_set_bytes(session.kv_shape())) / kPageTokens * tokens;
  bytes.resident_kv =
      compressor == nullptr ? 0 : static_cast<double>(compressor->resident_bytes(tokens, session.kv_shape()));
  return bytes;
}

// Sequences that a mode has in flight.
int capacity(const BenchFlags& flags, ModelSession& session, int context, bool compressed) {
  if (flags.sequences != 0) {
    return flags.sequences;
  }
  EngineOptions options = flags.engine.options;
  options.max_model_len = plan_context(session.config(), options, context, flags.steps, "the context");
  const std::string compressor = compressed ? flags.policy.compressor : "none";
  return engine_capacity(session, options, flags.engine.device_memory, compressor,
                         compressed ? horizon_for(flags.policy.horizon, compressor) : 0, kMostSequences);
}

// One mode at one context: an engine that lives through all repeats, so that only the first of them meets fresh memory.
class Contender {
 public:
  Contender(const BenchFlags& flags, ModelSession& session, const PromptGroup& group, bool compressed, Trace* trace)
      : flags_(flags), group_(group) {
    EngineOptions options = flags.engine.options;
    options.trace = compressed ? trace : nullptr;
    options.max_model_len = plan_context(session.config(), options, group.longest(), flags.steps,
                                         fmt::format("the context {}", group.context));
    const std::string compressor = compressed ? flags.policy.compressor : "none";
    const int horizon = compressed ? horizon_for(flags.policy.horizon, compressor) : 0;
    options.max_sequences =
        std::min(static_cast<int>(group.prompts.size()), capacity(flags, session, group.context, compressed));
    engine_ = open_engine(session, options, flags.engine.device_memory, compressor, horizon);
    sequences_ = options.max_sequences;
    result_.mode = compressed ? "compressed" : "full";
    result_.compressor = compressor;
    result_.context = group.context;
    result_.prompt_tokens = group.longest();
    bytes_ = step_bytes(session, compressed ? make_compressor(compressor).get() : nullptr,
                        group.longest() + flags.steps / 2);
    const EngineStats& stats = engine_->stats();
    result_.peak_bytes = session.weight_bytes() + session.kernels().device_bytes() + engine_.device->used();
    result_.full_on_device = stats.full_on_device;
  }

  void measure() {
    BenchSample sample;
    sample.transcripts.resize(static_cast<size_t>(sequences_));
    engine_->hold_decoding(true);
    const double start = now_seconds();
    for (size_t i = 0; i < sample.transcripts.size(); ++i) {
      Request request{.prompt = group_.prompts[i],
                      .sampling = flags_.sampling,
                      .max_tokens = flags_.steps,
                      .stop_tokens = {},
                      .on_progress = {}};
      request.sampling.seed += i;
      submit_recorded(*engine_.engine, std::move(request), sample.transcripts[i]);
    }
    while (engine_->reading() && engine_->step()) {
    }
    // Those for which host memory has no room wait for others to end: what is measured are those whose prompt is read.
    result_.sequences =
        static_cast<int>(std::count_if(sample.transcripts.begin(), sample.transcripts.end(), in_flight));
    sample.prefill = prompt_tokens(sample) / std::max(now_seconds() - start, 1e-9);
    engine_->hold_decoding(false);
    const SequenceStats before = engine_->stats().speculation;
    // Measured while all are in flight, until the first of them is done; and from when each has had a verdict, so that
    // at either end as many drafts are undecided. Where that leaves nothing, from the beginning.
    DecodingWindow window = begin_window();
    const auto unjudged = [](const Transcript& t) { return t.tokens.size() == 1; };
    const auto done = [](const Transcript& t) { return t.finish.has_value(); };
    const auto any = [&](const auto& what) {
      return std::any_of(sample.transcripts.begin(), sample.transcripts.end(), what);
    };
    while (!any(done) && any(unjudged) && engine_->step()) {
    }
    if (!any(done)) {
      window = begin_window();
    }
    while (!any(done) && engine_->step()) {
    }
    end_window(sample, window);
    engine_->run();
    const SequenceStats& after = engine_->stats().speculation;
    sample.speculation.rounds = after.rounds - before.rounds;
    sample.speculation.drafted = after.drafted - before.drafted;
    sample.speculation.accepted = after.accepted - before.accepted;
    result_.samples.push_back(std::move(sample));
  }

  // Takes the texts of the first repeat for the share of distinct 8-grams, and the comparison where there is one.
  BenchResult result(const Contender* reference) {
    std::vector<std::vector<TokenId>> texts;
    for (const Transcript& transcript : result_.samples.front().transcripts) {
      texts.push_back(transcript.ids());
    }
    result_.distinct_8gram_share = distinct_8gram_share(texts);
    result_.step_bytes = static_cast<size_t>(
        bytes_.weights + result_.sequences * (result_.mode == "compressed" ? bytes_.resident_kv : bytes_.full_kv));
    if (reference != nullptr) {
      result_.identical = true;
      for (size_t r = 0; r < result_.samples.size(); ++r) {
        const size_t common =
            std::min(reference->result_.samples[r].transcripts.size(), result_.samples[r].transcripts.size());
        for (size_t i = 0; i < common; ++i) {
          const Comparison same =
              compare(reference->result_.samples[r].transcripts[i], result_.samples[r].transcripts[i]);
          result_.identical = *result_.identical && same.identical();
        }
      }
    }
    return result_;
  }

 private:
  struct DecodingWindow {
    double seconds = 0;  // when it begins
    EngineStats stats;
  };
  DecodingWindow begin_window() const { return {now_seconds(), engine_->stats()}; }
  // Its prompt is read.
  static bool in_flight(const Transcript& transcript) { return !transcript.tokens.empty(); }
  static double prompt_tokens(const BenchSample& sample) {
    double tokens = 0;
    for (const Transcript& transcript : sample.transcripts) {
      tokens += in_flight(transcript) ? transcript.prompt_tokens : 0;
    }
    return tokens;
  }
  void end_window(BenchSample& sample, const DecodingWindow& window) const {
    const EngineStats& before = window.stats;
    const EngineStats& after = engine_->stats();
    const double sequences = result_.sequences;
    const double seconds = std::max(now_seconds() - window.seconds, 1e-9);
    const double tokens = static_cast<double>(after.decided_tokens - before.decided_tokens);
    sample.decode = tokens / seconds;
    sample.wire_bytes_per_token =
        tokens == 0 ? 0 : static_cast<double>(after.wire_in_bytes_decode - before.wire_in_bytes_decode) / tokens;
    const double drafts = static_cast<double>(after.draft_steps - before.draft_steps);
    const double passes = static_cast<double>(after.decode_passes - before.decode_passes);
    const double full_rows =
        result_.mode == "full" ? sequences : 1;  // verifications are staggered: one sequence each, as a rule
    sample.read_gbps = (drafts * (bytes_.weights + sequences * bytes_.resident_kv) +
                        passes * (bytes_.weights + full_rows * bytes_.full_kv)) /
                       seconds / 1e9;
    const double wire_seconds = after.wire_seconds - before.wire_seconds;
    sample.wire_share = wire_seconds / seconds;
    sample.wire_gbps =
        wire_seconds == 0
            ? 0
            : static_cast<double>(after.wire_in_bytes_decode - before.wire_in_bytes_decode) / wire_seconds / 1e9;
  }

  const BenchFlags& flags_;
  const PromptGroup& group_;
  OpenEngine engine_;
  StepBytes bytes_;
  int sequences_ = 0;  // submitted
  BenchResult result_;
};

PromptGroup gather_prompts(const BenchFlags& flags, ModelSession& session, int context, int count) {
  if (flags.workload == "code") {
    return text_group(session.tokenizer(), read_prompt_file(flags.prompt_file), context, count);
  }
  return records_group(session.tokenizer(), context, count, flags.sampling.seed);
}

PromptGroup gather_group(const BenchFlags& flags, ModelSession& session, int context) {
  const int count = std::max(flags.mode == "compressed" ? 1 : capacity(flags, session, context, false),
                             flags.mode == "full" ? 1 : capacity(flags, session, context, true));
  return gather_prompts(flags, session, context, count);
}

// "auto" stands for something else at every context.
BenchFlags with_chosen_compressor(const BenchFlags& flags, ModelSession& session, EngineOptions options, int context) {
  BenchFlags chosen = flags;
  if (is_auto(flags.policy.compressor) && flags.mode != "full") {
    options.max_model_len = plan_context(session.config(), options, context, flags.steps, "the context");
    const PromptGroup group = gather_prompts(flags, session, context, 1);
    const ChosenPolicy policy =
        choose_policy(session, options, flags.engine.device_memory, flags.policy, group.prompts, flags.sampling);
    chosen.policy = {.compressor = policy.compressor, .horizon = fmt::format("{}", policy.horizon)};
    if (policy.horizon == EngineOptions::kAdaptive) {
      chosen.policy.horizon = "adaptive";
    }
  }
  return chosen;
}

std::vector<BenchResult> measure_context(const BenchFlags& flags, ModelSession& session, const PromptGroup& group,
                                         Trace* trace, ProgressLine& progress) {
  std::optional<Contender> full;
  std::optional<Contender> compressed;
  if (flags.mode != "compressed") {
    full.emplace(flags, session, group, false, trace);
  }
  if (flags.mode != "full") {
    compressed.emplace(flags, session, group, true, trace);
  }
  for (int repeat = 0; repeat < flags.repeats; ++repeat) {
    for (std::optional<Contender>* contender : {&full, &compressed}) {
      if (*contender) {
        progress.show(fmt::format("context {}, repeat {} of {}", group.context, repeat + 1, flags.repeats));
        (*contender)->measure();
      }
    }
  }
  progress.clear();
  std::vector<BenchResult> results;
  if (full) {
    results.push_back(full->result(nullptr));
  }
  if (compressed) {
    results.push_back(compressed->result(full ? &*full : nullptr));
  }
  for (BenchResult& result : results) {
    result.read_ceiling =
        read_ceiling_gbps(session.device_kind(), session.kernels(), session.threads(), result.step_bytes);
  }
  return results;
}

int bench(const BenchFlags& flags) {
  horizon_for(flags.policy.horizon, flags.policy.compressor);
  if (!is_auto(flags.policy.compressor)) {
    make_compressor(flags.policy.compressor);
  }
  validate(flags.sampling);
  if ((flags.workload == "code") != !flags.prompt_file.empty()) {
    throw UsageError("--workload code and --prompt-file go together: the file is the text to read");
  }
  ModelSession session(flags.engine.model);
  EngineOptions options = flags.engine.options;
  options.max_sequences = flags.sequences == 0 ? kMostSequences : flags.sequences;
  const int longest = *std::max_element(flags.contexts.begin(), flags.contexts.end());
  const int limit = options.max_model_len > 0 ? options.max_model_len : session.config().max_position;
  if (longest + flags.steps > limit) {
    throw UsageError("a context of {} and {} steps are more than the {} tokens that fit: lower --contexts or --steps",
                     longest, flags.steps, limit);
  }
  const int context =
      plan_context(session.config(), options, longest, flags.steps, fmt::format("the context {}", longest));
  ProgressLine progress;
  session.load(rows_with_probe(options, flags.policy.compressor),
               sequences_with_probe(options, flags.policy.compressor), context, progress);

  const std::unique_ptr<Trace> trace = open_trace(flags.engine.trace);
  std::vector<BenchResult> results;
  for (const int wanted : flags.contexts) {
    const BenchFlags here = with_chosen_compressor(flags, session, options, wanted);
    const PromptGroup group = gather_group(here, session, wanted);
    for (BenchResult& result : measure_context(here, session, group, trace.get(), progress)) {
      results.push_back(std::move(result));
    }
  }
  std::string heading;
  if (const std::string shape = session.widened_shape(); !shape.empty()) {
    heading = fmt::format("a trained model widened to {}: its function, the cost of that shape\n", shape);
  }
  const nlohmann::ordered_json settings = {
      {"model", flags.engine.model.model},
      {"widened_to", session.widened_shape()},
      {"command", flags.command_line},
      {"kernels", std::string(session.kernels().name())},
      {"compressor", is_auto(flags.policy.compressor) ? "auto" : make_compressor(flags.policy.compressor)->name()},
      {"workload", flags.workload},
      {"steps", flags.steps},
      {"repeats", flags.repeats},
      {"sequences", flags.sequences}};
  write_stdout(flags.json ? bench_json(settings, results) : heading + bench_table(results));
  const bool identical =
      std::none_of(results.begin(), results.end(), [](const BenchResult& r) { return r.identical && !*r.identical; });
  return identical ? 0 : 1;
}

}  // namespace

void add_bench(CLI::App& app, Command& chosen, const std::string& command_line) {
  CLI::App* command =
      app.add_subcommand("bench", "Measure decoding with the full cache against decoding with the compressed one");
  auto flags = std::make_shared<BenchFlags>();
  flags->command_line = command_line;
  add_engine_flags(*command, flags->engine);
  command->remove_option(command->get_option("--max-sequences"));
  add_policy_flags(*command, flags->policy);
  add_sampling_flags(*command, flags->sampling);
  command->add_option("--contexts", flags->contexts, "Prompt lengths in tokens")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--mode", flags->mode, "What to measure")
      ->check(CLI::IsMember({"both", "full", "compressed"}))
      ->capture_default_str();
  command
      ->add_option("--workload", flags->workload,
                   "records: tool calls that copy out of records; code: --prompt-file, cut to each context")
      ->check(CLI::IsMember({"records", "code"}))
      ->capture_default_str();
  command->add_option("--prompt-file", flags->prompt_file, "The text of --workload code");
  command->add_option("--steps", flags->steps, "Tokens to decode for each sequence")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command
      ->add_option("--repeats", flags->repeats, "Times that each mode is measured, alternating; medians are reported")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--sequences", flags->sequences, "Sequences decoded at once; 0: as many as each mode can hold")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_flag("--json", flags->json, "One JSON object on stdout instead of the table");
  command->footer(R"(Examples:
  vericache bench --model build/models/vericode-26m
  vericache bench --model DIR --contexts 16384 --device-memory 160Mi --wire-gbps 2 --horizon 64 --json
  vericache bench --model DIR --workload code --prompt-file engine.py --contexts 4096 --temperature 0.7)");
  command->callback([flags, &chosen] { chosen = [flags] { return bench(*flags); }; });
}

}  // namespace vericache
