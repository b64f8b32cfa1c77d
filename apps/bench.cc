#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "flags.h"
#include "kv/tail.h"
#include "model_session.h"
#include "prompts.h"
#include "read_ceiling.h"
#include "terminal.h"
#include "transcript.h"
#include "workload.h"

namespace vericache {
namespace {

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
  int sequences = 1;
  bool json = false;
  std::string command_line;
};

struct Sample {
  double prefill = 0;  // tokens/s, all sequences together
  double decode = 0;
  double wire_bytes_per_token = 0;
  double read_gbps = 0;
  SequenceStats speculation;
  std::deque<Transcript> transcripts;
};

struct Result {
  std::string mode;
  int context = 0;
  int prompt_tokens = 0;
  std::vector<Sample> samples;
  std::optional<bool> identical;  // to the full mode of the same repeat
  double distinct_8gram_share = 0;
  bool full_on_device = false;
  size_t step_bytes = 0;    // that one step of its decoding (compressed: of its drafting) reads
  double read_ceiling = 0;  // GB/s of reading as many bytes again and again

  template <typename Value>
  std::vector<double> sorted(const Value& value) const {
    std::vector<double> values;
    values.reserve(samples.size());
    for (const Sample& sample : samples) {
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

double prefill_of(const Sample& s) {
  return s.prefill;
}
double decode_of(const Sample& s) {
  return s.decode;
}
double wire_of(const Sample& s) {
  return s.wire_bytes_per_token;
}
double read_of(const Sample& s) {
  return s.read_gbps;
}
double accepted_of(const Sample& s) {
  return per_round(s.speculation);
}

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

// One mode at one context: an engine that lives through all repeats, so that only the first of them meets fresh memory.
class Contender {
 public:
  Contender(const BenchFlags& flags, ModelSession& session, const PromptGroup& group, bool compressed)
      : flags_(flags), group_(group) {
    EngineOptions options = flags.engine.options;
    options.max_sequences = flags.sequences;
    options.max_model_len = plan_context(session.config(), options, group.longest(), flags.steps,
                                         fmt::format("the context {}", group.context));
    const std::string compressor = compressed ? flags.policy.compressor : "none";
    const int horizon = compressed ? horizon_for(flags.policy.horizon, compressor) : 0;
    engine_ = open_engine(session, options, flags.engine.device_memory, compressor, horizon);
    result_.mode = compressed ? "compressed" : "full";
    result_.context = group.context;
    result_.prompt_tokens = group.longest();
    result_.full_on_device = engine_->stats().full_on_device;
    bytes_ = step_bytes(session, compressed ? make_compressor(compressor).get() : nullptr,
                        group.longest() + flags.steps / 2);
    result_.step_bytes =
        static_cast<size_t>(bytes_.weights + flags.sequences * (compressed ? bytes_.resident_kv : bytes_.full_kv));
  }

  void measure() {
    Sample sample;
    sample.transcripts.resize(group_.prompts.size());
    const double start = now_seconds();
    for (size_t i = 0; i < group_.prompts.size(); ++i) {
      Request request{.prompt = group_.prompts[i],
                      .sampling = flags_.sampling,
                      .max_tokens = flags_.steps,
                      .stop_tokens = {},
                      .on_progress = {}};
      request.sampling.seed += i;
      submit_recorded(*engine_.engine, std::move(request), sample.transcripts[i]);
    }
    const auto reading = [](const Transcript& t) { return t.tokens.empty() && !t.finish; };
    while (std::any_of(sample.transcripts.begin(), sample.transcripts.end(), reading) && engine_->step()) {
    }
    const double decoding = now_seconds();
    const EngineStats before = engine_->stats();
    engine_->run();
    finish(sample, start, decoding, now_seconds(), before);
    result_.samples.push_back(std::move(sample));
  }

  // Takes the texts of the first repeat for the share of distinct 8-grams, and the comparison where there is one.
  Result result(const Contender* reference) {
    std::vector<std::vector<TokenId>> texts;
    for (const Transcript& transcript : result_.samples.front().transcripts) {
      texts.push_back(transcript.ids());
    }
    result_.distinct_8gram_share = distinct_8gram_share(texts);
    if (reference != nullptr) {
      result_.identical = true;
      for (size_t r = 0; r < result_.samples.size(); ++r) {
        for (size_t i = 0; i < group_.prompts.size(); ++i) {
          const Comparison same =
              compare(reference->result_.samples[r].transcripts[i], result_.samples[r].transcripts[i]);
          result_.identical = *result_.identical && same.identical();
        }
      }
    }
    return result_;
  }

 private:
  void finish(Sample& sample, double start, double decoding, double end, const EngineStats& before) {
    const EngineStats& after = engine_->stats();
    double prompt_tokens = 0;
    for (const Transcript& transcript : sample.transcripts) {
      prompt_tokens += transcript.prompt_tokens;
    }
    const double sequences = static_cast<double>(sample.transcripts.size());
    const double seconds = std::max(end - decoding, 1e-9);
    const double tokens = static_cast<double>(after.decided_tokens - before.decided_tokens);
    sample.prefill = prompt_tokens / std::max(decoding - start, 1e-9);
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
    sample.speculation.rounds = after.speculation.rounds - before.speculation.rounds;
    sample.speculation.drafted = after.speculation.drafted - before.speculation.drafted;
    sample.speculation.accepted = after.speculation.accepted - before.speculation.accepted;
  }

  const BenchFlags& flags_;
  const PromptGroup& group_;
  OpenEngine engine_;
  StepBytes bytes_;
  Result result_;
};

PromptGroup gather_group(const BenchFlags& flags, ModelSession& session, int context) {
  if (flags.workload == "code") {
    return text_group(session.tokenizer(), read_prompt_file(flags.prompt_file), context, flags.sequences);
  }
  return records_group(session.tokenizer(), context, flags.sequences, flags.sampling.seed);
}

std::vector<Result> measure_context(const BenchFlags& flags, ModelSession& session, const PromptGroup& group,
                                    ProgressLine& progress) {
  std::optional<Contender> full;
  std::optional<Contender> compressed;
  if (flags.mode != "compressed") {
    full.emplace(flags, session, group, false);
  }
  if (flags.mode != "full") {
    compressed.emplace(flags, session, group, true);
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
  std::vector<Result> results;
  if (full) {
    results.push_back(full->result(nullptr));
  }
  if (compressed) {
    results.push_back(compressed->result(full ? &*full : nullptr));
  }
  for (Result& result : results) {
    result.read_ceiling = read_ceiling_gbps(session.kernels(), session.threads(), result.step_bytes);
  }
  return results;
}

// compressed / full at one context, where both were measured.
nlohmann::ordered_json ratios_json(const std::vector<Result>& results) {
  nlohmann::ordered_json ratios = nlohmann::ordered_json::array();
  for (size_t i = 0; i + 1 < results.size(); ++i) {
    const Result& a = results[i];
    const Result& b = results[i + 1];
    if (a.mode == "full" && b.mode == "compressed" && a.context == b.context) {
      ratios.push_back({{"context", a.context},
                        {"decode", b.median(decode_of) / a.median(decode_of)},
                        {"prefill", b.median(prefill_of) / a.median(prefill_of)}});
    }
  }
  return ratios;
}

std::string json_report(const BenchFlags& flags, ModelSession& session, const std::vector<Result>& results) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Result& r : results) {
    const std::vector<double> decode = r.sorted(decode_of);
    const std::vector<double> prefill = r.sorted(prefill_of);
    list.push_back({{"mode", r.mode},
                    {"context", r.context},
                    {"prompt_tokens", r.prompt_tokens},
                    {"prefill_tokens_per_second", r.median(prefill_of)},
                    {"prefill_spread", {prefill.front(), prefill.back()}},
                    {"decode_tokens_per_second", r.median(decode_of)},
                    {"decode_spread", {decode.front(), decode.back()}},
                    {"accepted_per_round", r.median(accepted_of)},
                    {"wire_bytes_per_token", r.median(wire_of)},
                    {"read_gbps", r.median(read_of)},
                    {"read_ceiling_gbps", r.read_ceiling},
                    {"read_share_of_ceiling", r.median(read_of) / r.read_ceiling},
                    {"full_on_device", r.full_on_device},
                    {"identical", r.identical ? nlohmann::ordered_json(*r.identical) : nlohmann::ordered_json()},
                    {"distinct_8gram_share", r.distinct_8gram_share}});
  }
  const nlohmann::ordered_json json = {{"model", flags.engine.model.model},
                                       {"command", flags.command_line},
                                       {"kernels", std::string(session.kernels().name())},
                                       {"compressor", make_compressor(flags.policy.compressor)->name()},
                                       {"workload", flags.workload},
                                       {"steps", flags.steps},
                                       {"repeats", flags.repeats},
                                       {"sequences", flags.sequences},
                                       {"results", list},
                                       {"ratios", ratios_json(results)}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string table(const std::vector<Result>& results) {
  std::string out = fmt::format("{:>8} {:<10} {:>13} {:>12} {:>17} {:>14} {:>12} {:>14} {:>9} {:>7}\n", "context",
                                "mode", "prefill tok/s", "decode tok/s", "[least, most]", "accepted/round",
                                "wire/token", "read GB/s", "identical", "8-grams");
  for (const Result& r : results) {
    const std::vector<double> decode = r.sorted(decode_of);
    out += fmt::format("{:>8} {:<10} {:>13.0f} {:>12.1f} {:>17} {:>14.1f} {:>12} {:>14} {:>9} {:>6.0f}%\n", r.context,
                       r.mode, r.median(prefill_of), r.median(decode_of),
                       fmt::format("[{:.1f}, {:.1f}]", decode.front(), decode.back()), r.median(accepted_of),
                       bytes_text(r.median(wire_of)),
                       fmt::format("{:.1f} ({:.0f}%)", r.median(read_of), 100 * r.median(read_of) / r.read_ceiling),
                       !r.identical   ? ""
                       : *r.identical ? "yes"
                                      : "NO",
                       100 * r.distinct_8gram_share);
  }
  for (const auto& ratio : ratios_json(results)) {
    out += fmt::format("context {}: compressed decodes {:.2f}x as fast as full, prefills {:.2f}x\n",
                       ratio["context"].get<int>(), ratio["decode"].get<double>(), ratio["prefill"].get<double>());
  }
  return out +
         "read: weights and KV over time, and its share of the ceiling, the rate of plainly reading as many bytes "
         "again and again;\n"
         "8-grams: share of distinct ones in the output\n";
}

int bench(const BenchFlags& flags) {
  horizon_for(flags.policy.horizon, flags.policy.compressor);
  make_compressor(flags.policy.compressor);
  validate(flags.sampling);
  if ((flags.workload == "code") != !flags.prompt_file.empty()) {
    throw UsageError("--workload code and --prompt-file go together: the file is the text to read");
  }
  ModelSession session(flags.engine.model);
  EngineOptions options = flags.engine.options;
  options.max_sequences = flags.sequences;
  const int longest = *std::max_element(flags.contexts.begin(), flags.contexts.end());
  const int limit = options.max_model_len > 0 ? options.max_model_len : session.config().max_position;
  if (longest + flags.steps > limit) {
    throw UsageError("a context of {} and {} steps are more than the {} tokens that fit: lower --contexts or --steps",
                     longest, flags.steps, limit);
  }
  const int context =
      plan_context(session.config(), options, longest, flags.steps, fmt::format("the context {}", longest));
  ProgressLine progress;
  session.load(most_rows(options), context, progress);

  std::vector<Result> results;
  for (const int wanted : flags.contexts) {
    const PromptGroup group = gather_group(flags, session, wanted);
    for (Result& result : measure_context(flags, session, group, progress)) {
      results.push_back(std::move(result));
    }
  }
  write_stdout(flags.json ? json_report(flags, session, results) : table(results));
  const bool identical =
      std::none_of(results.begin(), results.end(), [](const Result& r) { return r.identical && !*r.identical; });
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
  command->add_option("--sequences", flags->sequences, "Sequences decoded at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_flag("--json", flags->json, "One JSON object on stdout instead of the table");
  command->footer(R"(Examples:
  vericache bench --model build/models/vericode-26m
  vericache bench --model DIR --contexts 16384 --device-memory 160Mi --wire-gbps 2 --horizon 64 --json
  vericache bench --model DIR --workload code --prompt-file engine.py --contexts 4096 --temperature 0.7)");
  command->callback([flags, &chosen] { chosen = [flags] { return bench(*flags); }; });
}

}  // namespace vericache
