// Eval report: the figures of `eval` for people, for scripts and for a browser.
// Pure; any thread.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval_measure.h"

namespace vericache {

// What was measured with what.
struct EvalSettings {
  std::string model;
  std::string widened_to;
  std::string kernels;
  std::string command;
  std::string source;  // of the code workload; empty: it did not run
  std::string horizon;
  int documents = 0;
  uint64_t seed = 0;
  KvShape shape;
};

// How each figure comes about, a line each: name and meaning.
std::vector<std::pair<std::string_view, std::string>> eval_legend(const EvalSettings& settings);

// The columns of every table, and a row of each cell in them.
std::vector<std::string_view> eval_columns();
std::vector<std::string> eval_row(const EvalCell& cell, const KvShape& shape);

std::string eval_table(const EvalSettings& settings, std::span<const EvalCell> cells);
std::string eval_json(const EvalSettings& settings, std::span<const EvalCell> cells);
// One page that needs nothing but itself: for each workload a chart (inline SVG) and its table. Well-formed as XML.
std::string eval_html(const EvalSettings& settings, std::span<const EvalCell> cells);

}  // namespace vericache
