#include "eval_report.h"

#include <fmt/format.h>

#include <algorithm>

#include "terminal.h"
#include "transcript.h"

namespace vericache {
namespace {

std::string rate(int part, int whole) {
  return fmt::format("{}/{}", part, whole);
}

// Where nothing crossed, or nobody knows the right answer, there is no number.
std::string number_or_dash(const std::optional<double>& value, std::string_view format) {
  return value ? fmt::format(fmt::runtime(format), *value) : "-";
}

nlohmann::ordered_json json_or_null(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

nlohmann::ordered_json answers_json(const EvalCell& cell, const Answers& answers) {
  if (!cell.has_answers) {
    return nullptr;
  }
  return {{"right", answers.right},
          {"rate", static_cast<double>(answers.right) / cell.prompts},
          {"items_share", answers.items / cell.prompts}};
}

nlohmann::ordered_json cell_json(const EvalCell& cell, const KvShape& shape) {
  nlohmann::ordered_json rounds;
  for (size_t h = 0; h < kEvalHorizons.size(); ++h) {
    rounds[fmt::format("{}", kEvalHorizons[h])] = cell.tokens_per_round(h);
  }
  const EngineStats& s = cell.stats;
  return {{"workload", cell.workload},
          {"context", cell.context},
          {"temperature", cell.temperature},
          {"compressor", cell.compressor},
          {"prompts", cell.prompts},
          {"tokens", cell.tokens},
          {"agreement", cell.agreement()},
          {"agreed", cell.agreed},
          {"judged", cell.judged},
          {"tokens_per_round", rounds},
          {"resident_bits_per_value", cell.resident_bits()},
          {"resident_bytes", cell.resident_bytes},
          {"wire_bits_per_value", json_or_null(cell.wire_bits(shape))},
          {"wire_bytes_per_accepted_token", json_or_null(cell.wire_bytes_per_accepted())},
          {"verify_wire_bytes", s.verify_wire_bytes},
          {"verify_wire_tokens", s.verify_wire_tokens},
          {"speculation", speculation_json(s.speculation)},
          {"peak_resident_bytes", s.peak_resident_bytes},
          {"peak_full_bytes", s.peak_full_bytes},
          {"full_on_device", s.full_on_device},
          {"full", answers_json(cell, cell.full)},
          {"lossy_alone", answers_json(cell, cell.alone)},
          {"vericache", answers_json(cell, cell.verified)},
          {"lossy_alone_same_text", cell.alone_same},
          {"distinct_8gram_share", cell.distinct_8gram_share},
          {"identical", cell.mismatches == 0},
          {"mismatches", cell.mismatches},
          {"first_mismatch",
           cell.first_mismatch.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(cell.first_mismatch)}};
}

}  // namespace

std::vector<std::pair<std::string_view, std::string>> eval_legend(const EvalSettings& settings) {
  std::string horizons = fmt::format("{}", fmt::join(kEvalHorizons, ", "));
  return {
      {"agreement",
       "teacher-forced: the prompt is read exactly and compressed once, the full cache's text is fed position by "
       "position, drafts compute the KV of what is fed (bf16), and a draft agrees if it is the token that the full "
       "cache chose with the same temperature and seed"},
      {"tok/round", fmt::format("computed from those drafts at horizons {}: a round is the drafts up to the first that "
                                "disagrees, at most the horizon, and the token that the verification chooses",
                                horizons)},
      {"resident", "bits per value of K and V after the prompt, in the whole pages that are held"},
      {"wire", "bits per value of what crossed for verifications, measured by the engine"},
      {"wire/accepted",
       fmt::format("bytes that crossed for verifications over drafts that stood, in a run with horizon {}",
                   settings.horizon)},
      {"right: full, alone, VeriCache",
       "exact answers of the full cache; of the compressed cache alone, whose drafts are final, nothing verified (a "
       "compressor that extends takes in its own pages, one that chooses among tokens chose once); and of VeriCache. "
       "In "
       "brackets: the calls, records or values that are right"},
      {"same text", "texts of the compressed cache alone that are the full cache's, token by token"},
      {"8-grams", "share of distinct 8-grams in the full cache's texts: where text loops, every cache agrees"},
      {"identical", "VeriCache's tokens and the hashes of the logits behind them are the full cache's"}};
}

std::vector<std::string_view> eval_columns() {
  return {"workload", "context", "temp",      "compressor", "agreement", "tok/round @4",
          "@16",      "@64",     "@128",      "resident",   "wire",      "wire/accepted",
          "full",     "alone",   "VeriCache", "same text",  "8-grams",   "identical"};
}

std::vector<std::string> eval_row(const EvalCell& cell, const KvShape& shape) {
  const auto answers = [&](const Answers& a) {
    return cell.has_answers ? fmt::format("{} ({:.0f} %)", rate(a.right, cell.prompts), 100 * a.items / cell.prompts)
                            : "-";
  };
  const std::optional<double> per_accepted = cell.wire_bytes_per_accepted();
  std::vector<std::string> row = {cell.workload, fmt::format("{}", cell.context), fmt::format("{:g}", cell.temperature),
                                  cell.compressor, fmt::format("{:.1f} %", 100 * cell.agreement())};
  for (size_t h = 0; h < kEvalHorizons.size(); ++h) {
    row.push_back(fmt::format("{:.1f}", cell.tokens_per_round(h)));
  }
  const std::vector<std::string> rest = {fmt::format("{:.2f}", cell.resident_bits()),
                                         number_or_dash(cell.wire_bits(shape), "{:.2f}"),
                                         per_accepted ? bytes_text(*per_accepted) : "-",
                                         answers(cell.full),
                                         answers(cell.alone),
                                         answers(cell.verified),
                                         rate(cell.alone_same, cell.prompts),
                                         fmt::format("{:.0f} %", 100 * cell.distinct_8gram_share),
                                         cell.mismatches == 0 ? "yes" : "NO"};
  row.insert(row.end(), rest.begin(), rest.end());
  return row;
}

std::string eval_table(const EvalSettings& settings, std::span<const EvalCell> cells) {
  std::vector<std::vector<std::string>> rows;
  rows.emplace_back();
  for (const std::string_view column : eval_columns()) {
    rows.back().emplace_back(column);
  }
  for (const EvalCell& cell : cells) {
    rows.push_back(eval_row(cell, settings.shape));
  }
  std::string out = fmt::format("{}, {}, {} documents a workload, seed {}{}\n",
                                settings.widened_to.empty()
                                    ? settings.model
                                    : settings.model + " (a trained model widened to " + settings.widened_to + ")",
                                settings.kernels, settings.documents, settings.seed,
                                settings.source.empty() ? "" : ", code from " + settings.source);
  for (const auto& [name, meaning] : eval_legend(settings)) {
    out += fmt::format("{}: {}\n", name, meaning);
  }
  out += "\n";
  constexpr size_t kLeftColumns = 4;
  std::vector<size_t> widths(rows.front().size());
  for (const std::vector<std::string>& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  for (const std::vector<std::string>& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line +=
          i < kLeftColumns ? fmt::format("{:<{}}", row[i], widths[i] + 2) : fmt::format("{:>{}}  ", row[i], widths[i]);
    }
    out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return out;
}

std::string eval_json(const EvalSettings& settings, std::span<const EvalCell> cells) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  bool identical = true;
  for (const EvalCell& cell : cells) {
    list.push_back(cell_json(cell, settings.shape));
    identical = identical && cell.mismatches == 0;
  }
  nlohmann::ordered_json legend;
  for (const auto& [name, meaning] : eval_legend(settings)) {
    legend[std::string(name)] = meaning;
  }
  const nlohmann::ordered_json json = {
      {"identical", identical},
      {"model", settings.model},
      {"widened_to", settings.widened_to},
      {"kernels", settings.kernels},
      {"command", settings.command},
      {"source", settings.source.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(settings.source)},
      {"horizon", settings.horizon},
      {"documents", settings.documents},
      {"seed", settings.seed},
      {"legend", legend},
      {"cells", list}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace vericache
