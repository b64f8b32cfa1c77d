#include "bench_report.h"

#include <fmt/format.h>

#include "terminal.h"

namespace vericache {
namespace {

double prefill_of(const BenchSample& s) {
  return s.prefill;
}
double decode_of(const BenchSample& s) {
  return s.decode;
}
double wire_of(const BenchSample& s) {
  return s.wire_bytes_per_token;
}
double read_of(const BenchSample& s) {
  return s.read_gbps;
}
double wire_share_of(const BenchSample& s) {
  return s.wire_share;
}
double wire_gbps_of(const BenchSample& s) {
  return s.wire_gbps;
}
double accepted_of(const BenchSample& s) {
  return per_round(s.speculation);
}

// compressed / full at one context, where both were measured.
nlohmann::ordered_json ratios_json(const std::vector<BenchResult>& results) {
  nlohmann::ordered_json ratios = nlohmann::ordered_json::array();
  for (size_t i = 0; i + 1 < results.size(); ++i) {
    const BenchResult& a = results[i];
    const BenchResult& b = results[i + 1];
    if (a.mode == "full" && b.mode == "compressed" && a.context == b.context) {
      ratios.push_back({{"context", a.context},
                        {"decode", b.median(decode_of) / a.median(decode_of)},
                        {"prefill", b.median(prefill_of) / a.median(prefill_of)}});
    }
  }
  return ratios;
}

}  // namespace

std::string bench_json(const nlohmann::ordered_json& settings, const std::vector<BenchResult>& results) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const BenchResult& r : results) {
    const std::vector<double> decode = r.sorted(decode_of);
    const std::vector<double> prefill = r.sorted(prefill_of);
    list.push_back({{"mode", r.mode},
                    {"compressor", r.compressor},
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
                    {"wire_share_of_time", r.median(wire_share_of)},
                    {"wire_gbps", r.median(wire_gbps_of)},
                    {"sequences", r.sequences},
                    {"device_bytes", r.peak_bytes},
                    {"full_on_device", r.full_on_device},
                    {"identical", r.identical ? nlohmann::ordered_json(*r.identical) : nlohmann::ordered_json()},
                    {"distinct_8gram_share", r.distinct_8gram_share}});
  }
  nlohmann::ordered_json json = settings;
  json["results"] = list;
  json["ratios"] = ratios_json(results);
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string bench_table(const std::vector<BenchResult>& results) {
  std::string out =
      fmt::format("{:>8} {:<10} {:>9} {:>13} {:>12} {:>17} {:>14} {:>12} {:>14} {:>14} {:>10} {:>9} {:>7}\n", "context",
                  "mode", "sequences", "prefill tok/s", "decode tok/s", "[least, most]", "accepted/round", "wire/token",
                  "wire GB/s", "read GB/s", "memory", "identical", "8-grams");
  for (const BenchResult& r : results) {
    const std::vector<double> decode = r.sorted(decode_of);
    out += fmt::format(
        "{:>8} {:<10} {:>9} {:>13.0f} {:>12.1f} {:>17} {:>14.1f} {:>12} {:>14} {:>14} {:>10} {:>9} {:>6.0f}%\n",
        r.context, r.mode, r.sequences, r.median(prefill_of), r.median(decode_of),
        fmt::format("[{:.1f}, {:.1f}]", decode.front(), decode.back()), r.median(accepted_of),
        bytes_text(r.median(wire_of)),
        fmt::format("{:.1f} ({:.0f}%)", r.median(wire_gbps_of), 100 * r.median(wire_share_of)),
        fmt::format("{:.1f} ({:.0f}%)", r.median(read_of), 100 * r.median(read_of) / r.read_ceiling),
        bytes_text(static_cast<double>(r.peak_bytes)),
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
         "wire: while something comes in, and the share of the time in which it does; "
         "read: weights and KV over time, and its share of the ceiling, the rate of plainly reading as many bytes "
         "again and again (a GPU: of copying);\n"
         "8-grams: share of distinct ones in the output\n";
}

}  // namespace vericache
