#include "flags.h"

#include <algorithm>
#include <cctype>
#include <charconv>

#include "base/error.h"
#include "base/parse_bytes.h"
#include "compress/compressor.h"

namespace vericache {
namespace {

constexpr int kMostHorizon = 512;

CLI::Option* add_bytes(CLI::App& command, const std::string& flag, size_t& bytes, const std::string& text) {
  const CLI::callback_t parse = [flag, &bytes](const CLI::results_t& given) {
    bytes = parse_bytes(given.back(), flag);
    return true;
  };
  return command.add_option(flag, parse, text)->type_name("BYTES");
}

}  // namespace

int parse_horizon(std::string_view text) {
  if (text == "adaptive") {
    return EngineOptions::kAdaptive;
  }
  int tokens = 0;
  const auto [rest, failure] = std::from_chars(text.data(), text.data() + text.size(), tokens);
  if (failure != std::errc{} || rest != text.data() + text.size() || tokens < 0 || tokens > kMostHorizon) {
    throw UsageError("--horizon '{}': give 'adaptive', or how many tokens to draft before a verification, 0 to {}",
                     text, kMostHorizon);
  }
  return tokens;
}

int horizon_for(std::string_view text, std::string_view compressor) {
  if (text.empty()) {
    return compressor == "none" ? 0 : EngineOptions::kAdaptive;
  }
  const int horizon = parse_horizon(text);
  if (horizon == 0 && compressor != "none") {
    throw UsageError(
        "--horizon 0 decodes with the full cache and drafts nothing: give it with --compressor none, or a horizon of 1 "
        "or more");
  }
  return horizon;
}

void add_model_flags(CLI::App& command, ModelFlags& flags) {
  command
      .add_option("--model", flags.model,
                  "Model directory in the Hugging Face form: config.json, model.safetensors, tokenizer.json")
      ->type_name("DIR")
      ->required();
  command
      .add_option("--device", flags.device,
                  "Where to compute: cpu, cuda, or auto (a GPU where there is one and this build knows it)")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
  command.add_option("--threads", flags.threads, "Threads that compute (default: every core)")
      ->check(CLI::Range(1, 1024));
  command.add_option("--isa", flags.isa,
                     "Instructions to use: portable, avx2, avx512, avx512_bf16 or amx (default: the best there is)");
}

void add_engine_flags(CLI::App& command, EngineFlags& flags) {
  add_model_flags(command, flags.model);
  EngineOptions& o = flags.options;
  add_bytes(command, "--device-memory", flags.device_memory,
            "Budget for weights, activations and the KV that stays on the device: 500000000, 500M, 512Mi or 'auto' "
            "(what is needed)");
  add_bytes(command, "--host-memory", o.host_memory, "Budget for the full KV outside the device, in the same form");
  command
      .add_option_function<std::string>(
          "--kv-store",
          [&o](const std::string& text) {
            const BlockStoreSpec spec = parse_block_store(text);
            o.store_bytes = spec.bytes;
            o.open_store = [spec](size_t block_bytes, int blocks) {
              return make_block_store(spec, block_bytes, blocks);
            };
          },
          "Where the full KV goes that --host-memory has no room for: disk:DIR,size=64G or redis:HOST:PORT,size=64G")
      ->type_name("STORE");
  command.add_option("--wire-gbps", o.wire_gbps, "Cap the link between the tiers, GB/s each way (default: none)")
      ->check(CLI::Range(0.0, 1e6));
  command
      .add_option(
          "--wire-form", o.wire_form,
          "How the full KV crosses the link: plain (bf16 pages), coded (what the resident part lacks, exactly), "
          "auto (coded on a GPU)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, WireForm>{
          {"auto", WireForm::automatic}, {"plain", WireForm::plain}, {"coded", WireForm::coded}}))
      ->option_text("TEXT:{auto,plain,coded}=auto");
  command
      .add_option("--max-model-len", o.max_model_len,
                  "Most tokens of one sequence, prompt and output (default: what the work needs)")
      ->check(CLI::Range(2, 1 << 24));
  command.add_option("--max-sequences", o.max_sequences, "Sequences in flight at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command
      .add_option("--prefill-chunk", o.pass_rows, "Rows of one full pass: how much of a prompt is computed at a time")
      ->check(CLI::Range(1, 8192))
      ->capture_default_str();
  command.add_option("--ring-layers", o.ring_layers, "Layers of full KV that staging holds while they cross the wire")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      .add_option("--max-horizon", o.max_horizon, "Most tokens that the adaptive horizon drafts before a verification")
      ->check(CLI::Range(1, kMostHorizon))
      ->capture_default_str();
  command.add_option("--trace", flags.trace,
                     "Write what the lanes do to this file, for chrome://tracing or ui.perfetto.dev");
  // An empty group hides them: they exist to provoke the races and the damage that the checks are there for.
  command.add_option("--inject-delay-us", o.inject_delay_us)->check(CLI::Range(0, 1000000))->group("");
  command.add_option("--inject-corruption-every", o.inject_corruption_every)->group("");
}

void add_policy_flags(CLI::App& command, PolicyFlags& flags) {
  command
      .add_option("--compressor", flags.compressor,
                  "What stays in device memory; auto: what a probe of the first prompts finds fastest here:\n" +
                      std::string(compressor_help()))
      ->type_name("NAME[:OPTIONS]")
      ->capture_default_str();
  command.add_option(
      "--horizon", flags.horizon,
      "Tokens to draft before a verification, or 'adaptive' (the default; 0, plain full-KV decoding, with 'none')");
}

void add_sampling_flags(CLI::App& command, Sampling& sampling) {
  command.add_option("--temperature", sampling.temperature, "0 takes the most likely token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command.add_option("--top-k", sampling.top_k, "Only the k most likely tokens; 0 = all")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  command.add_option("--top-p", sampling.top_p, "Only the most likely tokens that sum to this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--min-p", sampling.min_p, "Only tokens with at least this share of the best one's probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--seed", sampling.seed, "The same seed gives the same tokens")->capture_default_str();
}

std::string command_line(int argc, const char* const* argv) {
  std::string line = "vericache";
  for (int i = 1; i < argc; ++i) {
    line += " ";
    line += argv[i];
  }
  return line;
}

void add_environment(CLI::App& command) {
  for (CLI::Option* option : command.get_options()) {
    const auto& names = option->get_lnames();
    // Options that exclude each other say where the input comes from: set in the environment, they would forbid the
    // other on the command line.
    if (names.empty() || names.front() == "help" || !option->get_excludes().empty()) {
      continue;
    }
    std::string variable = "VERICACHE_" + names.front();
    std::transform(variable.begin(), variable.end(), variable.begin(),
                   [](unsigned char c) { return c == '-' ? '_' : static_cast<char>(std::toupper(c)); });
    option->envname(variable);
  }
}

}  // namespace vericache
