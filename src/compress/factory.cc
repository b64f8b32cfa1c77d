#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <map>

#include "base/error.h"
#include "compress/compressor.h"
#include "compress/paged.h"
#include "compress/snapkv.h"
#include "compress/streaming_llm.h"

namespace vericache {
namespace {

constexpr std::string_view kHelp =
    "none | kivi[:bits=2|3|4|6|8 or k=..,v=..] | quarot[:bits=2|3|4|6|8 or k=..,v=..] | plane[:bits=6|7|8|9 or "
    "k=..,v=..] | fp8 | int8 | "
    "streaming-llm[:sinks=4,window=1024] | snapkv[:budget=0.2,window=32,kernel=7]; "
    "the last two with +kivi..., +quarot..., +plane..., +fp8 or +int8 appended quantize what they keep; budget and "
    "window are a "
    "share of the context (up to 1) or tokens";

// "name:key=value,key=value": the options of one method, each read once with its range.
class Spec {
 public:
  explicit Spec(std::string_view text) : text_(text) {
    const size_t colon = text.find(':');
    name_ = text.substr(0, colon);
    std::string_view rest = colon == std::string_view::npos ? "" : text.substr(colon + 1);
    while (!rest.empty()) {
      const size_t comma = rest.find(',');
      const std::string_view option = rest.substr(0, comma);
      const size_t equals = option.find('=');
      if (equals == std::string_view::npos ||
          !options_.emplace(option.substr(0, equals), option.substr(equals + 1)).second) {
        fail(fmt::format("'{}' is not one key=value", option));
      }
      rest = comma == std::string_view::npos ? "" : rest.substr(comma + 1);
    }
  }

  std::string_view name() const { return name_; }

  double number(std::string_view key, double fallback, double least, double most) {
    const auto option = options_.find(key);
    if (option == options_.end()) {
      return fallback;
    }
    double value = 0;
    const std::string_view digits = option->second;
    const auto [end, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (failed != std::errc() || end != digits.data() + digits.size() || !(value >= least && value <= most)) {
      fail(fmt::format("{} must be a number from {} to {}, not '{}'", key, least, most, digits));
    }
    options_.erase(option);
    return value;
  }
  int whole(std::string_view key, int fallback, int least, int most) {
    const double value = number(key, fallback, least, most);
    if (value != static_cast<int>(value)) {
      fail(fmt::format("{} must be a whole number", key));
    }
    return static_cast<int>(value);
  }
  int bits(std::string_view key, int fallback, std::initializer_list<int> choices) {
    const int value = whole(key, fallback, 2, 16);
    if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
      fail(fmt::format("{} must be one of {}", key, fmt::join(choices, ", ")));
    }
    return value;
  }
  void finish() const {
    if (!options_.empty()) {
      fail(fmt::format("unknown option '{}'", options_.begin()->first));
    }
  }
  [[noreturn]] void fail(std::string_view why) const {
    throw UsageError("compressor '{}': {}; there is: {}", text_, why, kHelp);
  }

 private:
  std::string_view text_;
  std::string_view name_;
  std::map<std::string_view, std::string_view> options_;
};

bool quantizes(std::string_view method) {
  return method == "kivi" || method == "quarot" || method == "plane" || method == "fp8" || method == "int8";
}

// The format of a method that quantizes.
KvFormat read_format(Spec& spec) {
  KvFormat format{8, 8};
  if (spec.name() == "kivi" || spec.name() == "quarot") {
    const int bits = spec.bits("bits", 4, {2, 3, 4, 6, 8});
    format = {spec.bits("k", bits, {2, 3, 4, 6, 8, 16}), spec.bits("v", bits, {2, 3, 4, 6, 8, 16})};
    format.rotated = spec.name() == "quarot";
  } else if (spec.name() == "plane") {
    const int bits = spec.bits("bits", 8, {6, 7, 8, 9});
    format = {spec.bits("k", bits, {6, 7, 8, 9, 16}), spec.bits("v", bits, {6, 7, 8, 9, 16}), KvCode::plane};
  } else {
    format.code = spec.name() == "fp8" ? KvCode::fp8 : KvCode::int8;
  }
  spec.finish();
  if (format.exact()) {
    spec.fail("k=16,v=16 is 'none'");
  }
  return format;
}

}  // namespace

std::string_view compressor_help() {
  return kHelp;
}

std::unique_ptr<Compressor> make_compressor(std::string_view text) {
  const size_t plus = text.find('+');
  Spec spec(text.substr(0, plus));
  KvFormat kept;
  if (plus != std::string_view::npos) {
    Spec then(text.substr(plus + 1));
    if (!quantizes(then.name())) {
      then.fail("only kivi, quarot, plane, fp8 or int8 can follow '+'");
    }
    kept = read_format(then);
    if (spec.name() != "streaming-llm" && spec.name() != "snapkv") {
      spec.fail("'+' composes a method that drops tokens with one that quantizes");
    }
  }
  if (spec.name() == "none") {
    spec.finish();
    return std::make_unique<PagedCompressor>(KvFormat{});
  }
  if (quantizes(spec.name())) {
    return std::make_unique<PagedCompressor>(read_format(spec));
  }
  if (spec.name() == "streaming-llm") {
    const int sinks = spec.whole("sinks", 4, 0, 1 << 20);
    const double window = spec.number("window", 1024, 0, 1 << 24);
    spec.finish();
    return std::make_unique<StreamingLlm>(sinks, window, kept);
  }
  if (spec.name() == "snapkv") {
    SnapKvOptions options;
    options.budget.amount = spec.number("budget", options.budget.amount, 0, 1 << 24);
    options.window = spec.whole("window", options.window, 1, 256);
    options.kernel = spec.whole("kernel", options.kernel, 1, 255);
    if (options.kernel % 2 == 0) {
      spec.fail("kernel must be odd: it reaches as far to either side");
    }
    options.budget.least = std::max(kPageTokens, options.window);
    spec.finish();
    return std::make_unique<SnapKv>(options, kept);
  }
  spec.fail(fmt::format("unknown method '{}'", spec.name()));
}

}  // namespace vericache
