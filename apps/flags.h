// Flags: what the command line says about model, engine and sampling, in one form for every subcommand; read once.
// Used from the main thread before anything is opened.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

#include "backend/sampling.h"
#include "engine/options.h"

namespace vericache {

struct ModelFlags {
  std::string model;            // directory, or "widen:DIR?shape=..."
  std::string device = "auto";  // cpu, cuda or auto
  int threads = 0;              // 0 = every core
  std::string isa;              // empty = the best that the processor has
};

struct EngineFlags {
  ModelFlags model;
  EngineOptions options;     // all but horizon
  std::string trace;         // file; empty = none
  size_t device_memory = 0;  // bytes for weights, activations and KV pools; 0 = as much as they need
};

// How one engine decodes: with which compressor and horizon, as typed.
struct PolicyFlags {
  std::string compressor = "quarot:bits=4";
  std::string horizon;  // empty = adaptive; 0 with `none`
};

// A subcommand, once its flags are parsed: returns the exit code.
using Command = std::function<int()>;

void add_model_flags(CLI::App& command, ModelFlags& flags);
void add_engine_flags(CLI::App& command, EngineFlags& flags);  // with those of the model
void add_policy_flags(CLI::App& command, PolicyFlags& flags);
void add_sampling_flags(CLI::App& command, Sampling& sampling);

// Gives every flag its environment variable: --max-tokens reads VERICACHE_MAX_TOKENS where the command line is silent.
void add_environment(CLI::App& command);

// The subcommands, a file each. `chosen` is set when the command line picks one.
void add_generate(CLI::App& app, Command& chosen);
void add_check(CLI::App& app, Command& chosen);
void add_bench(CLI::App& app, Command& chosen, const std::string& command_line);
void add_eval(CLI::App& app, Command& chosen, const std::string& command_line);
void add_logits(CLI::App& app, Command& chosen);
void add_inspect(CLI::App& app, Command& chosen);

// What was typed, for reports: "vericache bench --model m".
std::string command_line(int argc, const char* const* argv);

// "adaptive" or a number of tokens. UsageError.
int parse_horizon(std::string_view text);
// As parse_horizon, with the default that `compressor` calls for where `text` is empty.
int horizon_for(std::string_view text, std::string_view compressor);

}  // namespace vericache
