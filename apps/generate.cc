#include <fmt/format.h>

#include <csignal>
#include <memory>
#include <nlohmann/json.hpp>

#include "auto_compressor.h"
#include "base/error.h"
#include "flags.h"
#include "model_session.h"
#include "prompts.h"
#include "terminal.h"
#include "text_stream.h"
#include "transcript.h"

namespace vericache {
namespace {

constexpr int kInterrupted = 130;  // as a shell reports SIGINT

volatile std::sig_atomic_t interrupted = 0;

// The first Ctrl-C ends the generation with its summary, the second the process.
void interrupt_once() {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupted = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
}

struct GenerateFlags {
  EngineFlags engine;
  PolicyFlags policy;
  Sampling sampling;
  PromptFlags prompt;
  int max_tokens = 256;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool compare_full = false;
  bool json = false;
};

struct Generated {
  Transcript transcript;  // cut where a stop string was complete
  std::string text;
  std::string finish;
  EngineStats stats;
};

// Keeps the transcript's progress on the terminal until text begins.
void show_prefill(const Transcript& transcript, std::string_view what, ProgressLine& progress) {
  if (transcript.tokens.empty()) {
    progress.show(what, static_cast<size_t>(transcript.prompt_done), static_cast<size_t>(transcript.prompt_tokens));
  }
}

Generated generate_once(Engine& engine, const Request& request, const GenerateFlags& flags, const Tokenizer& tokenizer,
                        bool stream, std::string_view what) {
  Generated out;
  TextStream text(tokenizer, flags.stop, request.stop_tokens);
  ProgressLine progress;
  submit_recorded(engine, request, out.transcript);
  const auto emit = [&](const std::string& piece) {
    out.text += piece;
    if (stream && !piece.empty()) {
      progress.clear();
      write_stdout(piece);
    }
  };
  size_t read = 0;
  bool cancelled = false;
  for (bool more = true; more;) {
    more = engine.step();
    show_prefill(out.transcript, what, progress);
    for (; read < out.transcript.tokens.size() && !text.stopped(); ++read) {
      emit(text.push(out.transcript.tokens[read].id));
    }
    if (!cancelled && (text.stopped() || interrupted != 0)) {
      engine.cancel(out.transcript.id);
      cancelled = true;
    }
  }
  progress.clear();
  out.transcript.tokens.resize(read);
  if (!text.stopped()) {
    emit(text.flush());
  }
  out.stats = engine.stats();
  out.finish = text.stopped()          ? "stop"
               : interrupted != 0      ? "interrupted"
               : out.transcript.finish ? std::string(finish_reason_name(*out.transcript.finish))
                                       : "lost";
  return out;
}

double wire_bytes_per_token(const EngineStats& stats) {
  return stats.decided_tokens == 0
             ? 0
             : static_cast<double>(stats.wire_in_bytes_decode) / static_cast<double>(stats.decided_tokens);
}

struct Report {
  ChosenPolicy policy;
  Generated generated;
  size_t residual_bytes = 0;  // of the whole sequence, as it stood at the end
  size_t peak_memory = 0;
  struct Full {
    Generated generated;
    Comparison comparison;
  };
  std::optional<Full> full;
};

double speedup(const Generated& compressed, const Generated& full) {
  const double full_rate = full.transcript.decode_tokens_per_second();
  return full_rate == 0 ? 0 : compressed.transcript.decode_tokens_per_second() / full_rate;
}

void print_summary(const Report& report) {
  const Generated& g = report.generated;
  const SequenceStats& s = g.stats.speculation;
  const double planned = static_cast<double>(g.stats.weight_bytes + pool_bytes(g.stats));
  fmt::print(stderr, "\n\nprompt       {} tokens, {:.0f} tokens/s\n", g.transcript.prompt_tokens,
             g.transcript.prefill_tokens_per_second());
  fmt::print(stderr, "output       {} tokens, {:.1f} tokens/s, ended by: {}\n", g.transcript.tokens.size(),
             g.transcript.decode_tokens_per_second(), g.finish);
  if (s.rounds > 0) {
    fmt::print(stderr, "speculation  {} rounds, {:.1f} accepted of {:.1f} drafted tokens a round\n", s.rounds,
               per_round(s), static_cast<double>(s.drafted) / static_cast<double>(s.rounds));
  }
  fmt::print(stderr, "KV           resident {}, full {} ({}), residual {}\n",
             bytes_text(static_cast<double>(g.stats.peak_resident_bytes)),
             bytes_text(static_cast<double>(g.stats.peak_full_bytes)),
             g.stats.full_on_device ? "on the device" : "outside the device",
             bytes_text(static_cast<double>(report.residual_bytes)));
  fmt::print(stderr, "wire         {} a token\n", bytes_text(wire_bytes_per_token(g.stats)));
  if (g.stats.corrupt_blocks > 0) {
    fmt::print(stderr, "damage       {} blocks came back corrupt; {} tokens recomputed\n", g.stats.corrupt_blocks,
               g.stats.recomputed_tokens);
  }
  if (g.stats.replayed_tokens > 0) {
    fmt::print(stderr, "replay       {} rows behind the prompt, for what the compressor keeps\n",
               g.stats.replayed_tokens);
  }
  fmt::print(stderr, "memory       peak {}, weights + pools {}\n", bytes_text(static_cast<double>(report.peak_memory)),
             bytes_text(planned));
  if (report.full) {
    const Comparison& c = report.full->comparison;
    fmt::print(stderr, "full cache   {}: {} tokens, {:.1f} tokens/s; compressed is {:.2f}x as fast\n",
               c.identical() ? "identical, tokens and logits" : "DIFFERENT", c.tokens,
               report.full->generated.transcript.decode_tokens_per_second(), speedup(g, report.full->generated));
    if (c.first) {
      fmt::print(stderr, "             {} of {} differ, first {}\n", c.mismatches, c.tokens, describe(*c.first));
    }
  }
}

std::string json_report(const Report& report) {
  const Generated& g = report.generated;
  nlohmann::ordered_json json = {
      {"text", g.text},
      {"finish_reason", g.finish},
      {"prompt_tokens", g.transcript.prompt_tokens},
      {"tokens", g.transcript.ids()},
      {"hash", fmt::format("{:016x}", g.transcript.hash())},
      {"prefill_tokens_per_second", g.transcript.prefill_tokens_per_second()},
      {"decode_tokens_per_second", g.transcript.decode_tokens_per_second()},
      {"compressor", report.policy.compressor},
      {"speculation", speculation_json(g.stats.speculation)},
      {"wire_bytes_per_token", wire_bytes_per_token(g.stats)},
      {"residual_bytes", report.residual_bytes},
      {"corrupt_blocks", g.stats.corrupt_blocks},
      {"recomputed_tokens", g.stats.recomputed_tokens},
      {"replayed_tokens", g.stats.replayed_tokens},
      {"memory", memory_json(g.stats)},
      {"peak_memory_bytes", report.peak_memory},
  };
  if (!report.policy.reason.empty()) {
    json["compressor_reason"] = report.policy.reason;
  }
  if (report.full) {
    const Comparison& c = report.full->comparison;
    json["compare_full"] = {
        {"identical", c.identical()},
        {"tokens", c.tokens},
        {"mismatches", c.mismatches},
        {"hash", fmt::format("{:016x}", report.full->generated.transcript.hash())},
        {"decode_tokens_per_second", report.full->generated.transcript.decode_tokens_per_second()},
        {"prefill_tokens_per_second", report.full->generated.transcript.prefill_tokens_per_second()},
        {"speedup", speedup(g, report.full->generated)},
        {"full_on_device", report.full->generated.stats.full_on_device},
        {"wire_bytes_per_token", wire_bytes_per_token(report.full->generated.stats)},
        {"first_mismatch", c.first ? nlohmann::ordered_json(describe(*c.first)) : nlohmann::ordered_json()}};
  }
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

int generate(const GenerateFlags& flags) {
  horizon_for(flags.policy.horizon, flags.policy.compressor);
  if (!is_auto(flags.policy.compressor)) {
    make_compressor(flags.policy.compressor);
  }
  validate(flags.sampling);
  ModelSession session(flags.engine.model);
  const Tokenizer& tokenizer = session.tokenizer();
  Request request;
  request.prompt = encode_prompt(tokenizer, read_prompt(flags.prompt), "the prompt");
  request.sampling = flags.sampling;
  request.max_tokens = flags.max_tokens;
  if (!flags.ignore_eos) {
    request.stop_tokens = session.config().eos_tokens;
  }

  EngineOptions options = flags.engine.options;
  options.max_model_len =
      plan_context(session.config(), options, static_cast<int>(request.prompt.size()), flags.max_tokens, "the prompt");
  const std::unique_ptr<Trace> trace = open_trace(flags.engine.trace);
  options.trace = trace.get();
  ProgressLine progress;
  session.load(rows_with_probe(options, flags.policy.compressor),
               sequences_with_probe(options, flags.policy.compressor), options.max_model_len, progress);

  Report report;
  report.policy =
      choose_policy(session, options, flags.engine.device_memory, flags.policy, {&request.prompt, 1}, flags.sampling);
  interrupt_once();
  {
    const OpenEngine engine =
        open_engine(session, options, flags.engine.device_memory, report.policy.compressor, report.policy.horizon);
    report.generated = generate_once(*engine.engine, request, flags, tokenizer, !flags.json, "reading");
  }
  report.peak_memory = peak_memory_bytes();
  report.residual_bytes = make_compressor(report.policy.compressor)
                              ->wire_bytes(report.generated.transcript.prompt_tokens +
                                               static_cast<int>(report.generated.transcript.tokens.size()),
                                           session.kv_shape());
  if (flags.compare_full && interrupted == 0) {
    const OpenEngine engine = open_engine(session, options, flags.engine.device_memory, "none", 0);
    Generated full =
        generate_once(*engine.engine, request, flags, tokenizer, false, "reading again, for the full cache");
    const Comparison comparison = compare(full.transcript, report.generated.transcript);
    if (interrupted == 0) {
      report.full = {std::move(full), comparison};
    }
  }
  if (flags.json) {
    write_stdout(json_report(report));
  } else {
    print_summary(report);
  }
  if (interrupted != 0) {
    return kInterrupted;
  }
  if (report.generated.finish == finish_reason_name(FinishReason::failed)) {
    throw Error("the full KV came back damaged again and again: the memory of this machine is not to be trusted");
  }
  return report.full && !report.full->comparison.identical() ? 1 : 0;
}

}  // namespace

void add_generate(CLI::App& app, Command& chosen) {
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt and stream the text to stdout");
  auto flags = std::make_shared<GenerateFlags>();
  add_engine_flags(*command, flags->engine);
  add_policy_flags(*command, flags->policy);
  add_sampling_flags(*command, flags->sampling);
  CLI::Option* text = command->add_option("--prompt", flags->prompt.text, "The prompt itself (default: stdin)");
  command->add_option("--prompt-file", flags->prompt.file, "A file that holds the prompt; - is stdin")->excludes(text);
  command->add_option("--max-tokens", flags->max_tokens, "Most tokens to generate")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--stop", flags->stop, "End before this text; may be given again")->allow_extra_args(false);
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on after the model's end token");
  command->add_flag("--compare-full", flags->compare_full,
                    "Then decode with the full cache too, compare tokens and logits; exit 1 if they differ");
  command->add_flag("--json", flags->json, "One JSON object on stdout instead of the text");
  command->footer(R"(Examples:
  vericache generate --model build/models/vericode-26m --prompt-file examples/tool-calls-8k.txt --max-tokens 800 --compare-full
  echo 'def fibonacci(n):' | vericache generate --model build/models/vericode-26m --temperature 0.7 --seed 1
  vericache generate --model DIR --prompt-file F --compressor auto --device-memory 1Gi
  vericache generate --model DIR --prompt-file F --compressor snapkv:budget=0.2 --device-memory 128Mi --wire-gbps 2)");
  command->callback([flags, text, &chosen] {
    flags->prompt.text_given = text->count() > 0;
    chosen = [flags] { return generate(*flags); };
  });
}

}  // namespace vericache
