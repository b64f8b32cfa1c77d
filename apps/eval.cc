#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval_measure.h"
#include "eval_report.h"
#include "eval_tasks.h"
#include "flags.h"
#include "model_session.h"
#include "source_tree.h"
#include "terminal.h"

namespace vericache {
namespace {

struct EvalFlags {
  EngineFlags engine;
  std::vector<std::string> compressors = {"none",
                                          "kivi:bits=8",
                                          "kivi:bits=4",
                                          "kivi:bits=2",
                                          "quarot:bits=4",
                                          "snapkv:budget=0.2",
                                          "streaming-llm:window=0.2"};
  std::vector<std::string> budgets;
  std::vector<std::string> workloads;
  std::vector<int> contexts = {2048};
  std::vector<float> temperatures = {0.0f};
  std::string horizon = "64";
  std::string source;
  Sampling sampling;  // but for the temperature
  EvalLengths lengths;
  std::string json;
  std::string html;
  std::string command_line;
};

// "snapkv:budget=@" once for every budget.
std::vector<std::string> with_budgets(const EvalFlags& flags) {
  std::vector<std::string> specs;
  bool used = false;
  for (const std::string& spec : flags.compressors) {
    const size_t at = spec.find('@');
    if (at == std::string::npos) {
      specs.push_back(spec);
      continue;
    }
    if (flags.budgets.empty()) {
      throw UsageError("--compressor '{}' asks for budgets: give them with --budget", spec);
    }
    used = true;
    for (const std::string& budget : flags.budgets) {
      specs.push_back(spec.substr(0, at) + budget + spec.substr(at + 1));
    }
  }
  if (!used && !flags.budgets.empty()) {
    throw UsageError("--budget stands for the @ of a compressor, as in --compressor snapkv:budget=@");
  }
  for (const std::string& spec : specs) {
    make_compressor(spec);
  }
  return specs;
}

std::vector<std::string> chosen_workloads(const EvalFlags& flags) {
  std::vector<std::string> names;
  for (const EvalWorkload& workload : eval_workloads()) {
    names.emplace_back(workload.name);
  }
  for (const std::string& wanted : flags.workloads) {
    if (std::find(names.begin(), names.end(), wanted) == names.end()) {
      throw UsageError("--workload '{}' is unknown; there is: {}", wanted, fmt::join(names, ", "));
    }
  }
  return flags.workloads.empty() ? names : flags.workloads;
}

void write_file(const std::string& path, const std::string& text) {
  if (path.empty()) {
    return;
  }
  if (path == "-") {
    write_stdout(text);
    return;
  }
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (!out) {
    throw Error("{} cannot be written: {}", path, std::strerror(errno));
  }
}

// A file that cannot be written is found out before the hours of work, not after.
void try_file(const std::string& path) {
  if (!path.empty() && path != "-" && !std::ofstream(path, std::ios::binary | std::ios::app)) {
    throw Error("{} cannot be written: {}", path, std::strerror(errno));
  }
}

// The texts are drawn, and the whole work is found to fit, before anything is measured.
std::vector<EvalSet> gather(const EvalFlags& flags, const std::vector<std::string>& workloads, ModelSession& session,
                            const SourceTree* tree) {
  std::vector<EvalSet> sets;
  for (const std::string& workload : workloads) {
    for (const int context : flags.contexts) {
      EvalLengths lengths = flags.lengths;
      lengths.context = context;
      sets.push_back(make_eval_set(workload, lengths, flags.sampling.seed, session.tokenizer(), tree));
    }
  }
  return sets;
}

int eval(const EvalFlags& flags) {
  EvalPlan plan;
  plan.compressors = with_budgets(flags);
  plan.device_memory = flags.engine.device_memory;
  plan.options = flags.engine.options;
  plan.options.horizon = parse_horizon(flags.horizon);
  if (plan.options.horizon == 0) {
    throw UsageError("--horizon 0 drafts nothing: give 1 or more, or 'adaptive'");
  }
  const std::vector<std::string> workloads = chosen_workloads(flags);
  for (const float temperature : flags.temperatures) {
    plan.sampling = flags.sampling;
    plan.sampling.temperature = temperature;
    validate(plan.sampling);
  }
  try_file(flags.json);
  try_file(flags.html);
  std::optional<SourceTree> tree;
  if (std::find(workloads.begin(), workloads.end(), "code") != workloads.end()) {
    tree.emplace(flags.source);
  }
  ModelSession session(flags.engine.model);
  const std::vector<EvalSet> sets = gather(flags, workloads, session, tree ? &*tree : nullptr);
  int context = 0;
  for (const EvalSet& set : sets) {
    context = std::max(context,
                       plan_context(session.config(), plan.options, set.longest() - 1, 1,
                                    fmt::format("{} at --contexts {}, with its answer,", set.workload, set.context)));
  }
  ProgressLine progress;
  session.load(std::max(most_rows(plan.options), most_rows(EngineOptions{})),
               std::max(plan.options.max_sequences, kEvalBatch), context, progress);
  const std::unique_ptr<Trace> trace = open_trace(flags.engine.trace);
  plan.options.trace = trace.get();

  std::vector<EvalCell> cells;
  for (const EvalSet& set : sets) {
    for (const float temperature : flags.temperatures) {
      plan.sampling.temperature = temperature;
      for (EvalCell& cell : measure_eval(plan, set, session, [&](std::string_view text) { progress.show(text); })) {
        cells.push_back(std::move(cell));
      }
    }
  }
  progress.clear();
  const EvalSettings settings{.model = flags.engine.model.model,
                              .widened_to = session.widened_shape(),
                              .kernels = std::string(session.kernels().name()),
                              .command = flags.command_line,
                              .source = tree ? fmt::format("{} ({} files)", tree->root().string(), tree->files()) : "",
                              .horizon = flags.horizon,
                              .documents = flags.lengths.documents,
                              .seed = flags.sampling.seed,
                              .shape = session.kv_shape()};
  write_file(flags.json, eval_json(settings, cells));
  write_file(flags.html, eval_html(settings, cells));
  if (flags.json != "-" && flags.html != "-") {
    write_stdout(eval_table(settings, cells));
  }
  const auto wrong = std::find_if(cells.begin(), cells.end(), [](const EvalCell& cell) { return cell.mismatches > 0; });
  if (wrong != cells.end()) {
    fmt::print(stderr, "DIFFERENT from the full cache: {} at {}, temperature {}, {}: {}\n", wrong->workload,
               wrong->context, wrong->temperature, wrong->compressor, wrong->first_mismatch);
    return 1;
  }
  return 0;
}

template <typename T>
CLI::Option* add_list(CLI::App& command, const std::string& flag, std::vector<T>& values, const std::string& text) {
  return command.add_option(flag, values, text + "; may be given again")
      ->allow_extra_args(false)
      ->capture_default_str();
}

}  // namespace

void add_eval(CLI::App& app, Command& chosen, const std::string& command_line) {
  CLI::App* command = app.add_subcommand(
      "eval", "Measure what compressed caches answer alone, how far they agree, and what verifying costs");
  auto flags = std::make_shared<EvalFlags>();
  flags->command_line = command_line;
  add_engine_flags(*command, flags->engine);
  add_list(*command, "--compressor", flags->compressors, "Compressor to measure; @ in it stands for each --budget")
      ->type_name("NAME[:OPTIONS]");
  add_list(*command, "--budget", flags->budgets, "What the @ of a compressor stands for: 0.1, 0.5, 1024");
  add_list(*command, "--workload", flags->workloads,
           "code, calls, export, needle, multikey, multivalue, multiquery, variables, common-words or frequent-words "
           "(default: all)");
  command->add_option("--contexts", flags->contexts, "Prompt lengths in tokens")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--documents", flags->lengths.documents, "Prompts of each workload and length")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  add_list(*command, "--temperature", flags->temperatures, "Temperature to decode with")->check(CLI::Range(0.0, 100.0));
  command->add_option("--top-k", flags->sampling.top_k, "As in generate")->check(CLI::Range(0, 1 << 30));
  command->add_option("--top-p", flags->sampling.top_p, "As in generate")->check(CLI::Range(0.0, 1.0));
  command->add_option("--min-p", flags->sampling.min_p, "As in generate")->check(CLI::Range(0.0, 1.0));
  command->add_option("--seed", flags->sampling.seed, "Of documents and sampling; prompt i takes seed + i")
      ->capture_default_str();
  command->add_option("--steps", flags->lengths.code_tokens, "Tokens to decode after code")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command
      ->add_option("--answer-tokens", flags->lengths.answer_tokens,
                   "Most tokens of an answer; it may be 16 longer than the right one anyhow")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command->add_option("--horizon", flags->horizon, "Tokens that VeriCache drafts before a verification, or 'adaptive'")
      ->capture_default_str();
  command->add_option("--source,--prompt-file", flags->source,
                      "Directory (or file) whose source code the code workload continues (default: the Python library "
                      "of this machine, else src/ here)");
  command->add_option("--json", flags->json, "Write the figures to this file as JSON; - is stdout");
  command->add_option("--html", flags->html, "Write tables and charts to this file as one HTML page; - is stdout");
  command->footer(R"(Exit code 0 only if VeriCache's tokens and logits were the full cache's everywhere. Examples:
  vericache eval --model build/models/vericode-26m --html eval.html
  vericache eval --model DIR --workload calls --workload needle --contexts 4096,16384 --compressor snapkv:budget=@ --budget 0.1 --budget 0.5
  vericache eval --model DIR --workload code --source path/to/project --temperature 0 --temperature 0.8 --json eval.json)");
  command->callback([flags, &chosen] { chosen = [flags] { return eval(*flags); }; });
}

}  // namespace vericache
