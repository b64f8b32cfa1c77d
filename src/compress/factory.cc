#include <algorithm>
#include <charconv>
#include <cmath>
#include <initializer_list>
#include <map>
#include <vector>

#include "base/error.h"
#include "compress/adakv.h"
#include "compress/compressor.h"
#include "compress/expected_attention.h"
#include "compress/h2o.h"
#include "compress/keydiff.h"
#include "compress/knorm.h"
#include "compress/kvzip.h"
#include "compress/paged.h"
#include "compress/per_layer.h"
#include "compress/pyramidkv.h"
#include "compress/quest.h"
#include "compress/streaming_llm.h"
#include "compress/tova.h"

namespace vericache {
namespace {

constexpr std::string_view kHelp =
    "none | kivi[:bits=2|3|4|6|8 or k=..,v=..] | quarot[:bits=2|3|4|6|8 or k=..,v=..] | plane[:bits=6|7|8|9 or "
    "k=..,v=..] | fp8 | int8 | kvquant[:bits=2|3|4 or k=..,v=..,outliers=0.01] | streaming-llm[:sinks=4,window=1024] | "
    "snapkv[:budget=0.2,window=32,kernel=7] | pyramidkv[:budget=0.2,window=8,kernel=7,beta=20] | "
    "h2o[:budget=0.2] | tova[:budget=0.2] | knorm[:budget=0.2] | keydiff[:budget=0.2] | kvzip[:budget=0.2] | "
    "expected[:budget=0.2,window=128,future=512,sinks=4] | "
    "quest[:budget=0.2,dense=2] | "
    "adakv[:alpha=0.2](METHOD), where METHOD scores tokens: all but streaming-llm and quest of those with a budget; "
    "those that drop tokens or, as quest does, read some of them quantize what they keep with +kivi..., +quarot..., "
    "+plane..., +fp8, +int8 or +kvquant... appended; "
    ";layers=0-1:OTHER (or ;layers=3:OTHER) behind it all gives those layers another one; budget and window are a "
    "share "
    "of the context (up to 1) or tokens";

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

  // Names a text in messages, and reads nothing of it.
  static Spec quote(std::string_view text) {
    Spec spec("");
    spec.text_ = text;
    return spec;
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
  return method == "kivi" || method == "quarot" || method == "plane" || method == "fp8" || method == "int8" ||
         method == "kvquant";
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
  } else if (spec.name() == "kvquant") {
    const int bits = spec.bits("bits", 4, {2, 3, 4});
    format = {spec.bits("k", bits, {2, 3, 4, 16}), spec.bits("v", bits, {2, 3, 4, 16}), KvCode::nuq};
    const double outliers = 1000 * spec.number("outliers", 0.01, 0, kMostOutliers / 1000.0);
    format.outliers = static_cast<int>(std::lround(outliers));
    if (std::abs(outliers - format.outliers) > 1e-6) {
      spec.fail("outliers is a whole number of thousandths");
    }
  } else {
    format.code = spec.name() == "fp8" ? KvCode::fp8 : KvCode::int8;
  }
  spec.finish();
  if (format.exact()) {
    spec.fail("k=16,v=16 is 'none'");
  }
  return format;
}

Budget read_budget(Spec& spec) {
  Budget budget;
  budget.amount = spec.number("budget", budget.amount, 0, 1 << 24);
  return budget;
}

SnapKvOptions read_snapkv(Spec& spec, int window) {
  SnapKvOptions options;
  options.budget = read_budget(spec);
  options.window = spec.whole("window", window, 1, 256);
  options.kernel = spec.whole("kernel", options.kernel, 1, 255);
  if (options.kernel % 2 == 0) {
    spec.fail("kernel must be odd: it reaches as far to either side");
  }
  options.budget.least = std::max(kPageTokens, options.window);
  return options;
}

// A method that scores tokens, or null.
std::unique_ptr<ScoringCompressor> make_scorer(Spec& spec, const KvFormat& kept) {
  std::unique_ptr<ScoringCompressor> made;
  if (spec.name() == "snapkv") {
    made = std::make_unique<SnapKv>(read_snapkv(spec, SnapKvOptions{}.window), kept);
  } else if (spec.name() == "pyramidkv") {
    const SnapKvOptions options = read_snapkv(spec, 8);
    made = std::make_unique<PyramidKv>(options, spec.number("beta", 20, 1, 1 << 20), kept);
  } else if (spec.name() == "h2o") {
    made = std::make_unique<H2o>(read_budget(spec), kept);
  } else if (spec.name() == "tova") {
    made = std::make_unique<Tova>(read_budget(spec), kept);
  } else if (spec.name() == "knorm") {
    made = std::make_unique<KNorm>(read_budget(spec), kept);
  } else if (spec.name() == "keydiff") {
    made = std::make_unique<KeyDiff>(read_budget(spec), kept);
  } else if (spec.name() == "kvzip") {
    made = std::make_unique<KvZip>(read_budget(spec), kept);
  } else if (spec.name() == "expected") {
    ExpectedAttentionOptions options;
    options.budget = read_budget(spec);
    options.window = spec.whole("window", options.window, 1, 256);
    options.future = spec.whole("future", options.future, 1, 1 << 20);
    options.sinks = spec.whole("sinks", options.sinks, 0, kPageTokens);
    made = std::make_unique<ExpectedAttention>(options, kept);
  }
  if (made != nullptr) {
    spec.finish();
  }
  return made;
}

// "adakv:alpha=0.2(snapkv:budget=0.2)"
std::unique_ptr<Compressor> make_adakv(std::string_view text, const KvFormat& kept) {
  const size_t open = text.find('(');
  Spec spec(text.substr(0, open));
  if (spec.name() != "adakv") {
    spec.fail("only adakv wraps another method");
  }
  if (open == std::string_view::npos || text.back() != ')') {
    spec.fail("adakv wraps the method that scores tokens, as in adakv(snapkv:budget=0.2)");
  }
  const double alpha = spec.number("alpha", 0.2, 0, 1);
  spec.finish();
  Spec inner(text.substr(open + 1, text.size() - open - 2));
  std::unique_ptr<ScoringCompressor> scorer = make_scorer(inner, kept);
  if (scorer == nullptr) {
    inner.fail(fmt::format("adakv cannot wrap '{}'", inner.name()));
  }
  return std::make_unique<AdaKv>(std::move(scorer), alpha);
}

// One method, or one that drops tokens with the format of what it keeps.
std::unique_ptr<Compressor> make_method(std::string_view text) {
  const size_t plus = text.find('+', text.find(')') == std::string_view::npos ? 0 : text.find(')'));
  const std::string_view method = text.substr(0, plus);
  const bool wraps = method.find('(') != std::string_view::npos || method.substr(0, method.find(':')) == "adakv";
  Spec spec(wraps ? std::string_view("adakv") : method);
  KvFormat kept;
  if (plus != std::string_view::npos) {
    Spec then(text.substr(plus + 1));
    if (!quantizes(then.name())) {
      then.fail("only kivi, quarot, plane, fp8, int8 or kvquant can follow '+'");
    }
    kept = read_format(then);
    if (spec.name() == "none" || quantizes(spec.name())) {
      spec.fail("'+' composes a method that drops tokens, or quest, with one that quantizes");
    }
  }
  if (wraps) {
    return make_adakv(method, kept);
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
  if (spec.name() == "quest") {
    QuestOptions options;
    options.budget = spec.number("budget", options.budget, 0, 1 << 24);
    options.dense_layers = spec.whole("dense", options.dense_layers, 0, 9999);
    spec.finish();
    return std::make_unique<Quest>(options, kept);
  }
  if (std::unique_ptr<ScoringCompressor> scorer = make_scorer(spec, kept)) {
    return scorer;
  }
  spec.fail(fmt::format("unknown method '{}'", spec.name()));
}

int read_layer(std::string_view digits, const Spec& whole) {
  int layer = -1;
  const auto [end, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), layer);
  if (failed != std::errc() || end != digits.data() + digits.size() || layer < 0 || layer > 9999) {
    whole.fail(fmt::format("'{}' is not the number of a layer", digits));
  }
  return layer;
}

// "layers=0-1:SPEC"
LayerOverride read_override(std::string_view text, const Spec& whole) {
  constexpr std::string_view kLayers = "layers=";
  const size_t colon = text.find(':');
  if (!text.starts_with(kLayers) || colon == std::string_view::npos) {
    whole.fail(fmt::format("'{}' is not layers=FIRST-LAST:COMPRESSOR", text));
  }
  const std::string_view range = text.substr(kLayers.size(), colon - kLayers.size());
  const size_t dash = range.find('-');
  LayerOverride one;
  one.first = read_layer(range.substr(0, dash), whole);
  one.last = dash == std::string_view::npos ? one.first : read_layer(range.substr(dash + 1), whole);
  if (one.last < one.first) {
    whole.fail(fmt::format("layers={} ends before it begins", range));
  }
  one.compressor = make_method(text.substr(colon + 1));
  return one;
}

}  // namespace

std::string_view compressor_help() {
  return kHelp;
}

std::unique_ptr<Compressor> make_compressor(std::string_view text) {
  const size_t semicolon = text.find(';');
  std::unique_ptr<Compressor> usual = make_method(text.substr(0, semicolon));
  if (semicolon == std::string_view::npos) {
    return usual;
  }
  const Spec whole = Spec::quote(text);
  std::vector<LayerOverride> overrides;
  for (std::string_view rest = text.substr(semicolon + 1);;) {
    const size_t next = rest.find(';');
    LayerOverride one = read_override(rest.substr(0, next), whole);
    if (one.compressor->format() != usual->format()) {
      whole.fail(fmt::format("'{}' stores in another form than '{}': all layers share one", one.compressor->name(),
                             usual->name()));
    }
    for (const LayerOverride& other : overrides) {
      if (one.first <= other.last && other.first <= one.last) {
        whole.fail(fmt::format("layer {} is named twice", std::max(one.first, other.first)));
      }
    }
    overrides.push_back(std::move(one));
    if (next == std::string_view::npos) {
      return std::make_unique<PerLayer>(std::move(usual), std::move(overrides));
    }
    rest = rest.substr(next + 1);
  }
}

}  // namespace vericache
