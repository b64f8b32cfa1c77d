#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "auto_compressor.h"
#include "base/error.h"
#include "flags.h"
#include "model_session.h"
#include "prompts.h"
#include "terminal.h"
#include "transcript.h"
#include "workload.h"

namespace vericache {
namespace {

struct CheckFlags {
  CheckFlags() { engine.options.max_sequences = 4; }

  EngineFlags engine;
  std::vector<std::string> compressors = {"none",        "streaming-llm", "snapkv",
                                          "pyramidkv",   "h2o",           "tova",
                                          "knorm",       "keydiff",       "expected",
                                          "kvzip",       "adakv(snapkv)", "snapkv;layers=0-1:none",
                                          "kivi:bits=4", "quarot:bits=4", "snapkv:budget=0.2+kivi:bits=4"};
  std::vector<std::string> horizons = {"1", "4", "16", "64"};
  std::vector<float> temperatures = {0.0f, 0.7f, 1.0f};
  std::vector<int> contexts = {200, 2000};
  Sampling sampling;  // but for the temperature
  int documents = 4;
  std::vector<std::string> prompt_files;
  std::vector<std::string> prompt_lines;
  int max_tokens = 64;
  bool ignore_eos = true;
  bool json = false;
};

struct Cell {
  std::string compressor;
  std::string horizon;
  float temperature = 0;
  int context = 0;
  int64_t tokens = 0;
  int64_t mismatches = 0;
  EngineStats stats;
};

struct Outcome {
  std::vector<Cell> cells;
  SequenceStats speculation;
  int64_t tokens = 0;
  int64_t mismatches = 0;
  int64_t corrupt_blocks = 0;
  int64_t recomputed_tokens = 0;
  std::string first_mismatch;
};

std::vector<PromptGroup> gather_prompts(const CheckFlags& flags, ModelSession& session) {
  const Tokenizer& tokenizer = session.tokenizer();
  PromptGroup given;
  for (const std::string& file : flags.prompt_files) {
    given.prompts.push_back(encode_prompt(tokenizer, read_prompt_file(file), file));
    given.names.push_back(file);
  }
  for (const std::string& file : flags.prompt_lines) {
    for (std::vector<TokenId>& prompt : read_prompt_lines(file, tokenizer, session.config().vocab_size)) {
      given.prompts.push_back(std::move(prompt));
      given.names.push_back(fmt::format("{} prompt {}", file, given.prompts.size()));
    }
  }
  std::vector<PromptGroup> groups;
  if (!given.prompts.empty()) {
    given.context = given.longest();
    groups.push_back(std::move(given));
    return groups;
  }
  for (const int context : flags.contexts) {
    groups.push_back(records_group(tokenizer, context, flags.documents, flags.sampling.seed));
  }
  return groups;
}

// Decodes every prompt of the group; sequences share the engine as far as it lets them.
std::deque<Transcript> decode(Engine& engine, const PromptGroup& group, float temperature, const CheckFlags& flags,
                              const std::vector<TokenId>& end_tokens) {
  std::deque<Transcript> transcripts(group.prompts.size());
  for (size_t i = 0; i < group.prompts.size(); ++i) {
    Request request{.prompt = group.prompts[i],
                    .sampling = flags.sampling,
                    .max_tokens = flags.max_tokens,
                    .stop_tokens = {},
                    .on_progress = {}};
    request.sampling.temperature = temperature;
    request.sampling.seed += i;
    if (!flags.ignore_eos) {
      request.stop_tokens = end_tokens;
    }
    submit_recorded(engine, std::move(request), transcripts[i]);
  }
  engine.run();
  return transcripts;
}

class Check {
 public:
  Check(const CheckFlags& flags, ModelSession& session, std::vector<PromptGroup> groups)
      : flags_(flags), session_(session), groups_(std::move(groups)) {
    total_ = groups_.size() * flags.temperatures.size() * (flags.compressors.size() * flags.horizons.size() + 1);
  }

  Outcome run() {
    for (const PromptGroup& group : groups_) {
      for (const float temperature : flags_.temperatures) {
        const std::deque<Transcript> expected = baseline(group, temperature);
        for (const std::string& compressor : flags_.compressors) {
          for (const std::string& horizon : flags_.horizons) {
            cell(group, temperature, compressor, horizon, expected);
          }
        }
      }
    }
    progress_.clear();
    return std::move(outcome_);
  }

 private:
  EngineOptions options_for(const PromptGroup& group) const {
    EngineOptions options = flags_.engine.options;
    options.max_model_len =
        plan_context(session_.config(), options, group.longest(), flags_.max_tokens, "the longest prompt");
    return options;
  }

  // The plainest decoding there is: the full KV in device memory, one sequence at a time, no faults injected.
  std::deque<Transcript> baseline(const PromptGroup& group, float temperature) {
    progress_.show("checking", done_++, total_);
    EngineOptions options;
    options.max_model_len = options_for(group).max_model_len;
    const OpenEngine engine = open_engine(session_, options, 0, "none", 0);
    return decode(*engine.engine, group, temperature, flags_, session_.config().eos_tokens);
  }

  void cell(const PromptGroup& group, float temperature, const std::string& compressor, const std::string& horizon,
            const std::deque<Transcript>& expected) {
    progress_.show("checking", done_++, total_);
    const OpenEngine engine =
        open_engine(session_, options_for(group), flags_.engine.device_memory, compressor, parse_horizon(horizon));
    const std::deque<Transcript> got = decode(*engine.engine, group, temperature, flags_, session_.config().eos_tokens);
    Cell cell{compressor, horizon, temperature, group.context, 0, 0, engine->stats()};
    for (size_t i = 0; i < expected.size(); ++i) {
      const Comparison comparison = compare(expected[i], got[i]);
      cell.tokens += comparison.tokens;
      cell.mismatches += comparison.mismatches;
      if (comparison.first && outcome_.first_mismatch.empty()) {
        outcome_.first_mismatch =
            fmt::format("compressor {}, horizon {}, temperature {}, context {}, {}: {}", compressor, horizon,
                        temperature, group.context, group.names[i], describe(*comparison.first));
      }
    }
    add(std::move(cell));
  }

  void add(Cell cell) {
    const SequenceStats& s = cell.stats.speculation;
    progress_.clear();
    if (outcome_.cells.empty()) {
      fmt::print(stderr, "{:<34} {:>8} {:>11} {:>8} {:>8} {:>10} {:>8} {:>14}\n", "compressor", "horizon",
                 "temperature", "context", "tokens", "mismatches", "rounds", "accepted/round");
    }
    fmt::print(stderr, "{:<34} {:>8} {:>11} {:>8} {:>8} {:>10} {:>8} {:>14.1f}\n", cell.compressor, cell.horizon,
               cell.temperature, cell.context, cell.tokens, cell.mismatches, s.rounds, per_round(s));
    outcome_.tokens += cell.tokens;
    outcome_.mismatches += cell.mismatches;
    outcome_.corrupt_blocks += cell.stats.corrupt_blocks;
    outcome_.recomputed_tokens += cell.stats.recomputed_tokens;
    outcome_.speculation.rounds += s.rounds;
    outcome_.speculation.drafted += s.drafted;
    outcome_.speculation.accepted += s.accepted;
    outcome_.cells.push_back(std::move(cell));
  }

  const CheckFlags& flags_;
  ModelSession& session_;
  std::vector<PromptGroup> groups_;
  ProgressLine progress_;
  size_t done_ = 0;
  size_t total_ = 0;
  Outcome outcome_;
};

std::string json_report(const Outcome& outcome, const CheckFlags& flags) {
  nlohmann::ordered_json cells = nlohmann::ordered_json::array();
  for (const Cell& cell : outcome.cells) {
    const SequenceStats& s = cell.stats.speculation;
    cells.push_back({{"compressor", cell.compressor},
                     {"horizon", cell.horizon},
                     {"temperature", cell.temperature},
                     {"context", cell.context},
                     {"tokens", cell.tokens},
                     {"mismatches", cell.mismatches},
                     {"rounds", s.rounds},
                     {"drafted", s.drafted},
                     {"accepted", s.accepted},
                     {"accepted_per_round", per_round(s)},
                     {"corrupt_blocks", cell.stats.corrupt_blocks},
                     {"recomputed_tokens", cell.stats.recomputed_tokens},
                     {"replayed_tokens", cell.stats.replayed_tokens},
                     {"wire_in_bytes", cell.stats.wire_in_bytes},
                     {"wire_out_bytes", cell.stats.wire_out_bytes},
                     {"full_on_device", cell.stats.full_on_device}});
  }
  const nlohmann::ordered_json json = {
      {"identical", outcome.mismatches == 0},
      {"tokens", outcome.tokens},
      {"mismatches", outcome.mismatches},
      {"first_mismatch",
       outcome.first_mismatch.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(outcome.first_mismatch)},
      {"rounds", outcome.speculation.rounds},
      {"drafted", outcome.speculation.drafted},
      {"accepted", outcome.speculation.accepted},
      {"accepted_per_round", per_round(outcome.speculation)},
      {"corrupt_blocks", outcome.corrupt_blocks},
      {"recomputed_tokens", outcome.recomputed_tokens},
      {"model", flags.engine.model.model},
      {"seed", flags.sampling.seed},
      {"max_tokens", flags.max_tokens},
      {"cells", cells}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

void validate_matrix(const CheckFlags& flags) {
  for (const std::string& compressor : flags.compressors) {
    if (!is_auto(compressor)) {
      make_compressor(compressor);
    }
    for (const std::string& horizon : flags.horizons) {
      horizon_for(horizon, compressor);
    }
  }
  for (const float temperature : flags.temperatures) {
    Sampling sampling = flags.sampling;
    sampling.temperature = temperature;
    validate(sampling);
  }
}

// What "auto" stands for with these prompts.
std::vector<std::string> chosen_compressors(const CheckFlags& flags, ModelSession& session, const PromptGroup& group,
                                            int context) {
  std::vector<std::string> chosen;
  EngineOptions options = flags.engine.options;
  options.max_model_len = context;
  for (const std::string& compressor : flags.compressors) {
    const PolicyFlags asked{.compressor = compressor, .horizon = ""};
    chosen.push_back(
        choose_policy(session, options, flags.engine.device_memory, asked, group.prompts, flags.sampling).compressor);
  }
  return chosen;
}

int check_identity(const CheckFlags& given) {
  CheckFlags flags = given;
  validate_matrix(flags);
  ModelSession session(flags.engine.model);
  std::vector<PromptGroup> groups = gather_prompts(flags, session);
  int context = 0;
  for (const PromptGroup& group : groups) {
    context = std::max(context, plan_context(session.config(), flags.engine.options, group.longest(), flags.max_tokens,
                                             "the longest prompt"));
  }
  {
    const bool probes = std::any_of(flags.compressors.begin(), flags.compressors.end(),
                                    [](const std::string& compressor) { return is_auto(compressor); });
    ProgressLine progress;
    session.load(std::max(most_rows(flags.engine.options), most_rows(EngineOptions{})),
                 sequences_with_probe(flags.engine.options, probes ? "auto" : ""), context, progress);
  }
  flags.compressors = chosen_compressors(flags, session, groups.front(), context);
  const Outcome outcome = Check(flags, session, std::move(groups)).run();
  if (outcome.mismatches > 0) {
    fmt::print(stderr, "first mismatch: {}\n", outcome.first_mismatch);
  }
  const std::string verdict =
      fmt::format("{}: {} tokens in {} cells, {} mismatches, {} rounds, {:.1f} accepted tokens a round\n",
                  outcome.mismatches == 0 ? "identical" : "DIFFERENT", outcome.tokens, outcome.cells.size(),
                  outcome.mismatches, outcome.speculation.rounds, per_round(outcome.speculation));
  write_stdout(flags.json ? json_report(outcome, flags) : verdict);
  return outcome.mismatches == 0 ? 0 : 1;
}

// A repeated option replaces the whole default list. One value each, so that a value may hold commas.
template <typename T>
CLI::Option* add_list(CLI::App& command, const std::string& flag, std::vector<T>& values, const std::string& text) {
  return command.add_option(flag, values, text + "; may be given again")
      ->allow_extra_args(false)
      ->capture_default_str();
}

}  // namespace

void add_check(CLI::App& app, Command& chosen) {
  CLI::App* command =
      app.add_subcommand("check", "Prove that compressed decoding gives the tokens and logits of full-KV decoding");
  auto flags = std::make_shared<CheckFlags>();
  add_engine_flags(*command, flags->engine);
  add_list(*command, "--compressor", flags->compressors, "Compressor to check, or auto")->type_name("NAME[:OPTIONS]");
  add_list(*command, "--horizon", flags->horizons, "Horizon to check, a number or 'adaptive'");
  add_list(*command, "--temperature", flags->temperatures, "Temperature to check")->check(CLI::Range(0.0, 100.0));
  add_list(*command, "--context", flags->contexts, "Tokens of the generated documents")->check(CLI::Range(1, 1 << 24));
  command->add_option("--documents", flags->documents, "Generated documents for each context")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  add_list(*command, "--prompt-file", flags->prompt_files,
           "A file that holds one prompt, instead of generated documents");
  add_list(*command, "--prompts", flags->prompt_lines,
           "A file with one {\"prompt\": \"...\"} or {\"ids\": [...]} a line");
  command->add_option("--max-tokens", flags->max_tokens, "Tokens to decode for each prompt")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--top-k", flags->sampling.top_k, "As in generate")->check(CLI::Range(0, 1 << 30));
  command->add_option("--top-p", flags->sampling.top_p, "As in generate")->check(CLI::Range(0.0, 1.0));
  command->add_option("--min-p", flags->sampling.min_p, "As in generate")->check(CLI::Range(0.0, 1.0));
  command->add_option("--seed", flags->sampling.seed, "Of documents and sampling; prompt i samples with seed + i")
      ->capture_default_str();
  command->add_flag("--ignore-eos,!--no-ignore-eos", flags->ignore_eos,
                    "Decode exactly --max-tokens for each prompt (the default)");
  command->add_flag("--json", flags->json, "One JSON object on stdout instead of the verdict");
  command->footer(R"(Exit code 0 only if every cell is identical. Examples:
  vericache check --model build/models/vericode-5m
  vericache check --model DIR --compressor kivi:bits=4 --compressor snapkv --horizon 16 --temperature 0 --context 8000 --documents 2
  vericache check --model DIR --prompts prompts.jsonl --max-tokens 256 --device-memory 128Mi --wire-gbps 2 --json)");
  command->callback([flags, &chosen] { chosen = [flags] { return check_identity(*flags); }; });
}

}  // namespace vericache
