#include <fmt/format.h>

#include <algorithm>

#include "eval_report.h"
#include "terminal.h"

namespace vericache {
namespace {

constexpr std::string_view kStyle = R"(
:root { color-scheme: light dark; --surface: #fcfcfb; --ink: #1b1b1a; --muted: #6b6a66; --rule: #deddd8; --bar: #2a78d6; --bad: #c8352b; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --ink: #f1f0ec; --muted: #a3a29c; --rule: #3a3a37; --bar: #4c93e6; --bad: #f0796f; } }
body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; background: var(--surface); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 0.2rem; border-top: 1px solid var(--rule); padding-top: 1.2rem; }
p, dd { color: var(--muted); margin-top: 0.2rem; } dt { font-weight: 600; } dd { margin-left: 0; }
code { font: 13px ui-monospace, monospace; }
figure { margin: 1rem 0; overflow-x: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .muted { fill: var(--muted); } svg .head { font-weight: 600; }
svg .bar { fill: var(--bar); } svg .track { stroke: var(--rule); } svg .mark { stroke: var(--ink); stroke-width: 2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); } th { color: var(--muted); font-weight: 600; }
th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left; } .bad { color: var(--bad); font-weight: 700; })";

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        // XML has no other control characters.
        out += static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t' ? '?' : c;
    }
  }
  return out;
}

constexpr int kLabelWidth = 330;
constexpr int kPanelWidth = 250;
constexpr int kBarWidth = 165;
constexpr int kRowHeight = 22;
constexpr int kHeadHeight = 26;

// One of the charts that share a row of bars for every cell.
struct Panel {
  std::string title;
  double most = 1;                   // where a bar is full
  double (*value)(const EvalCell&);  // of the bar
  std::string (*text)(const EvalCell&);
  double (*mark)(const EvalCell&) = nullptr;  // a tick beside the bar
};

double share(int part, int whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / whole;
}
double alone_share(const EvalCell& cell) {
  return cell.has_answers ? share(cell.alone.right, cell.prompts) : share(cell.alone_same, cell.prompts);
}
double verified_share(const EvalCell& cell) {
  return cell.has_answers ? share(cell.verified.right, cell.prompts) : cell.mismatches == 0 ? 1.0 : 0.0;
}
double round_at_64(const EvalCell& cell) {
  return cell.tokens_per_round(2);
}
double wire_each(const EvalCell& cell) {
  return cell.wire_bytes_per_accepted().value_or(0);
}

std::vector<Panel> panels_of(std::span<const EvalCell> cells) {
  double most_tokens = 1;
  double most_wire = 1;
  for (const EvalCell& cell : cells) {
    most_tokens = std::max(most_tokens, round_at_64(cell));
    most_wire = std::max(most_wire, wire_each(cell));
  }
  const bool answers = cells.front().has_answers;
  return {{.title = answers ? "exact answers, lossy alone" : "full cache's text, lossy alone",
           .most = 1,
           .value = alone_share,
           .text = [](const EvalCell& cell) { return fmt::format("{:.0f} %", 100 * alone_share(cell)); },
           .mark = verified_share},
          {.title = "tokens a round at horizon 64",
           .most = most_tokens,
           .value = round_at_64,
           .text = [](const EvalCell& cell) { return fmt::format("{:.1f}", round_at_64(cell)); }},
          {.title = "wire bytes per accepted token",
           .most = most_wire,
           .value = wire_each,
           .text = [](const EvalCell& cell) {
             const std::optional<double> bytes = cell.wire_bytes_per_accepted();
             return bytes ? bytes_text(*bytes) : std::string("none accepted");
           }}};
}

std::string panel_row(const Panel& panel, const EvalCell& cell, int x, int y) {
  const double width = kBarWidth * std::clamp(panel.value(cell) / panel.most, 0.0, 1.0);
  std::string out = fmt::format(
      R"(<line class="track" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/><rect class="bar" x="{0}" y="{3}" width="{4:.1f}" height="14" rx="2"/>)",
      x, y, y + kRowHeight, y + 4, width);
  double end = width;
  if (panel.mark != nullptr) {
    const double at = kBarWidth * std::clamp(panel.mark(cell), 0.0, 1.0);
    out += fmt::format(R"(<line class="mark" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}"/>)", x + at, y + 1, y + 21);
    end = std::max(end, at);
  }
  return out + fmt::format(R"(<text class="muted" x="{:.1f}" y="{}">{}</text>)", x + end + 6, y + 15,
                           escaped(panel.text(cell)));
}

std::string chart(std::span<const EvalCell> cells) {
  const std::vector<Panel> panels = panels_of(cells);
  const int width = kLabelWidth + static_cast<int>(panels.size()) * kPanelWidth;
  const int height = kHeadHeight + kRowHeight * static_cast<int>(cells.size()) + 4;
  std::string out = fmt::format(
      R"(<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img">)", width,
      height);
  out += fmt::format("<title>{} by compressor</title>", escaped(cells.front().workload));
  for (size_t p = 0; p < panels.size(); ++p) {
    out += fmt::format(R"(<text class="head" x="{}" y="15">{}</text>)", kLabelWidth + static_cast<int>(p) * kPanelWidth,
                       escaped(panels[p].title));
  }
  int y = kHeadHeight;
  for (const EvalCell& cell : cells) {
    const std::string label = cell.temperature == 0
                                  ? fmt::format("{}, {}", cell.compressor, cell.context)
                                  : fmt::format("{}, {}, T {:g}", cell.compressor, cell.context, cell.temperature);
    out += fmt::format("<g><title>{}: agreement {:.2f} %</title>", escaped(label), 100 * cell.agreement());
    out += fmt::format(R"(<text x="{}" y="{}" text-anchor="end">{}</text>)", kLabelWidth - 10, y + 15, escaped(label));
    for (size_t p = 0; p < panels.size(); ++p) {
      out += panel_row(panels[p], cell, kLabelWidth + static_cast<int>(p) * kPanelWidth, y);
    }
    out += "</g>\n";
    y += kRowHeight;
  }
  return out + "</svg>";
}

std::string table(std::span<const EvalCell> cells, const KvShape& shape) {
  std::string out = R"(<div class="scroll"><table><thead><tr>)";
  for (const std::string_view column : eval_columns()) {
    out += fmt::format("<th>{}</th>", escaped(column));
  }
  out += "</tr></thead><tbody>\n";
  for (const EvalCell& cell : cells) {
    out += "<tr>";
    for (const std::string& value : eval_row(cell, shape)) {
      out += value == "NO" ? R"(<td class="bad">NO</td>)" : fmt::format("<td>{}</td>", escaped(value));
    }
    out += "</tr>\n";
  }
  return out + "</tbody></table></div>";
}

std::string about(const std::string& workload) {
  for (const EvalWorkload& known : eval_workloads()) {
    if (known.name == workload) {
      return std::string(known.about);
    }
  }
  return workload;
}

}  // namespace

std::string eval_html(const EvalSettings& settings, std::span<const EvalCell> cells) {
  const auto wrong =
      std::count_if(cells.begin(), cells.end(), [](const EvalCell& cell) { return cell.mismatches > 0; });
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><meta name=\"viewport\" "
      "content=\"width=device-width, "
      "initial-scale=1\"/><title>VeriCache eval: {}</title><style>{}\n</style></head><body>\n",
      escaped(settings.model), kStyle);
  out += fmt::format(
      "<h1>Lossy caches alone, and verified</h1>\n<p>{}{}, {}; {} documents a workload, seed {}{}.</p>\n",
      escaped(settings.model),
      settings.widened_to.empty() ? "" : " (a trained model widened to " + escaped(settings.widened_to) + ")",
      escaped(settings.kernels), settings.documents, settings.seed,
      settings.source.empty() ? "" : "; code from " + escaped(settings.source));
  out += fmt::format("<p><code>{}</code></p>\n", escaped(settings.command));
  out += wrong == 0 ? "<p>VeriCache's tokens and logits were the full cache's in every row.</p>\n"
                    : fmt::format("<p class=\"bad\">VeriCache differed from the full cache in {} rows.</p>\n", wrong);
  out +=
      "<p>Bars: the compressed cache. Tick in the first chart: VeriCache with that compressor, which is the full "
      "cache's "
      "result.</p>\n";
  for (size_t begin = 0; begin < cells.size();) {
    size_t end = begin;
    while (end < cells.size() && cells[end].workload == cells[begin].workload) {
      ++end;
    }
    const std::span<const EvalCell> section = cells.subspan(begin, end - begin);
    out += fmt::format("<h2>{}</h2><p>{}</p>\n<figure>{}</figure>\n{}\n", escaped(section.front().workload),
                       escaped(about(section.front().workload)), chart(section), table(section, settings.shape));
    begin = end;
  }
  out += "<h2>What the figures are</h2><dl>\n";
  for (const auto& [name, meaning] : eval_legend(settings)) {
    out += fmt::format("<dt>{}</dt><dd>{}</dd>\n", escaped(name), escaped(meaning));
  }
  return out + "</dl></body></html>\n";
}

}  // namespace vericache
