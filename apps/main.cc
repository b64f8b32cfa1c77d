#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "flags.h"

namespace vericache {
namespace {

constexpr int kFailed = 1;
constexpr int kUsage = 2;

// CLI11 folds some messages over several lines; ours take one.
std::string one_line(std::string text) {
  while (!text.empty() && text.back() == '\n') {
    text.pop_back();
  }
  for (char& c : text) {
    c = c == '\n' ? ' ' : c;
  }
  return text;
}

// Levenshtein 1966: the least number of letters to insert, remove or replace.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0]++;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

// " (did you mean --x?)" where a name is near enough to be a slip.
std::string suggestion(std::string_view typed, const std::vector<std::string>& names) {
  std::string nearest;
  size_t least = std::max<size_t>(2, typed.size() / 3) + 1;
  for (const std::string& name : names) {
    if (const size_t distance = edit_distance(typed, name); distance < least) {
      least = distance;
      nearest = name;
    }
  }
  return nearest.empty() ? "" : fmt::format(" (did you mean {}?)", nearest);
}

std::vector<std::string> flag_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      names.push_back("--" + name);
    }
  }
  return names;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  return names;
}

std::string describe_usage(const CLI::App& app, const CLI::ParseError& error, int argc, const char* const* argv) {
  const auto chosen = app.get_subcommands();
  if (chosen.empty()) {
    const std::string names = fmt::format("{}", fmt::join(command_names(app), ", "));
    if (argc < 2) {
      return fmt::format("a command is missing: {}", names);
    }
    const std::string_view typed = argv[1];
    return typed.starts_with("-")
               ? fmt::format("unknown flag {} before a command: {}", typed, names)
               : fmt::format("unknown command '{}'{}: {}", typed, suggestion(typed, command_names(app)), names);
  }
  if (dynamic_cast<const CLI::ExtrasError*>(&error) == nullptr) {
    return one_line(error.what());
  }
  const std::vector<std::string> extra = chosen.front()->remaining();
  const auto flag =
      std::find_if(extra.begin(), extra.end(), [](const std::string& text) { return text.starts_with("-"); });
  if (flag != extra.end()) {
    return fmt::format("unknown flag {}{}", *flag,
                       suggestion(flag->substr(0, flag->find('=')), flag_names(*chosen.front())));
  }
  return fmt::format("unexpected argument '{}'", extra.empty() ? "" : extra.front());
}

int usage_error(const CLI::App& app, const CLI::ParseError& error, int argc, const char* const* argv) {
  const auto chosen = app.get_subcommands();
  const std::string command = chosen.empty() ? "vericache" : "vericache " + chosen.front()->get_name();
  fmt::print(stderr, "vericache: {}; '{} --help' lists what there is\n", describe_usage(app, error, argc, argv),
             command);
  return kUsage;
}

int run(int argc, char** argv) {
  CLI::App app("VeriCache: text from a compressed KV cache, bit for bit that of the full one", "vericache");
  app.set_version_flag("--version", VERICACHE_VERSION);
  app.require_subcommand(1);
  Command chosen;
  add_generate(app, chosen);
  add_check(app, chosen);
  add_bench(app, chosen, command_line(argc, argv));
  add_eval(app, chosen, command_line(argc, argv));
  add_logits(app, chosen);
  add_inspect(app, chosen);
  if (argc > 1) {
    const std::string_view name = argv[1];
    for (CLI::App* command : app.get_subcommands([&](CLI::App* sub) { return sub->get_name() == name; })) {
      add_environment(*command);
    }
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // --help, --version
      return app.exit(error);
    }
    return usage_error(app, error, argc, argv);
  }
  return chosen();
}

}  // namespace
}  // namespace vericache

int main(int argc, char** argv) {
  // A reader that closes the pipe ends the process quietly, also where the parent had ignored the signal.
  std::signal(SIGPIPE, SIG_DFL);
  try {
    return vericache::run(argc, argv);
  } catch (const vericache::UsageError& error) {
    fmt::print(stderr, "vericache: {}\n", vericache::one_line(error.what()));
    return vericache::kUsage;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "vericache: out of memory: lower --max-model-len, --max-sequences or --prefill-chunk\n");
  } catch (const std::exception& error) {
    fmt::print(stderr, "vericache: {}\n", vericache::one_line(error.what()));
  }
  return vericache::kFailed;
}
