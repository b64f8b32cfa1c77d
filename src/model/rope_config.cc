#include "model/rope_config.h"

#include <algorithm>
#include <array>

namespace vericache {
namespace {

// transformers 5 may nest the parameters under the layers' type; with full attention alone there is one.
const nlohmann::json* rope_object(const ConfigFields& fields) {
  const nlohmann::json* rope = fields.find("rope_scaling");
  if (rope == nullptr || is_nothing(*rope)) {
    rope = fields.find("rope_parameters");
  }
  if (rope != nullptr && rope->is_object() && rope->contains("full_attention")) {
    rope = &(*rope)["full_attention"];
  }
  return rope == nullptr || is_nothing(*rope) ? nullptr : rope;
}

RopeType read_rope_type(const ConfigFields& fields) {
  const auto type = fields.text("rope_type");
  const auto legacy = fields.text("type");
  const std::string name = type.value_or(legacy.value_or("default"));
  if (type && legacy && *type != *legacy) {
    throw Error("{}: \"rope_type\" is \"{}\" but \"type\" is \"{}\"; remove the wrong one", fields.where(),
                printable(*type), printable(*legacy));
  }
  if (name == "default") return RopeType::standard;
  if (name == "linear") return RopeType::linear;
  if (name == "llama3") return RopeType::llama3;
  if (name == "yarn") return RopeType::yarn;
  throw Error("{}: the rope type \"{}\" is not supported; {}", fields.where(), printable(name), kSupported);
}

void read_yarn(const ConfigFields& fields, Rope& rope) {
  const auto positive_or = [&](std::string_view key, double otherwise) {
    const double value = fields.number(key, 0, 1e6).value_or(0);
    return value == 0 ? otherwise : value;  // transformers reads zero as absent
  };
  rope.beta_fast = positive_or("beta_fast", rope.beta_fast);
  rope.beta_slow = positive_or("beta_slow", rope.beta_slow);
  if (rope.beta_fast < rope.beta_slow || rope.beta_slow < 1e-3) {
    throw Error("{}: yarn needs \"beta_fast\" (here {}) of at least \"beta_slow\" ({}), and that of at least 0.001",
                fields.where(), rope.beta_fast, rope.beta_slow);
  }
  rope.truncate = fields.flag("truncate", true);
  const double by_formula = yarn_attention_factor(rope.factor, fields.number("mscale", 0, 100).value_or(0),
                                                  fields.number("mscale_all_dim", 0, 100).value_or(0));
  rope.attention_factor = fields.number("attention_factor", 1e-3, 1e3).value_or(by_formula);
}

void read_scaling(const ConfigFields& fields, const ConfigFields& model, Rope& rope, int& max_position) {
  const auto outside = model.integer("original_max_position_embeddings", 1, kMaxPosition);  // this one wins
  const auto inside = fields.integer("original_max_position_embeddings", 1, kMaxPosition);
  rope.original_max_position = outside ? *outside : inside.value_or(max_position);
  const auto factor = fields.number("factor", 1, 1e6);
  if (!factor && (rope.type != RopeType::yarn || rope.original_max_position > max_position)) {
    throw Error("{}: \"factor\" is missing; it says how many times longer the context became", fields.where());
  }
  // Where max_position_embeddings disagrees with the factor, the factor counts, as in transformers 5.
  rope.factor = factor ? *factor : max_position / rope.original_max_position;
  if (rope.type == RopeType::llama3) {
    const auto low = fields.number("low_freq_factor", 1e-3, 1e6);
    const auto high = fields.number("high_freq_factor", 1e-3, 1e6);
    if (!low || !high || *low >= *high) {
      throw Error("{}: llama3 needs \"low_freq_factor\" and a larger \"high_freq_factor\"", fields.where());
    }
    rope.low_freq_factor = *low;
    rope.high_freq_factor = *high;
  }
  if (rope.type == RopeType::yarn) {
    read_yarn(fields, rope);
    // Users enable yarn by adding the scaling alone, so max_position_embeddings may still be the original context.
    const double stretched = std::min<double>(rope.factor * rope.original_max_position, kMaxPosition);
    max_position = std::max(max_position, static_cast<int>(stretched));
  }
}

}  // namespace

void read_rope(const ConfigFields& model, Rope& rope, int& max_position) {
  constexpr double kMaxTheta = 1e15;
  constexpr double kMinTheta = 1.0001;  // frequencies must fall, and yarn divides by log(theta)
  rope.theta = model.number("rope_theta", kMinTheta, kMaxTheta).value_or(rope.theta);
  const nlohmann::json* object = rope_object(model);
  if (object == nullptr) {
    return;
  }
  const ConfigFields fields(*object, model.where() + ": rope");
  constexpr std::array kFields = {"rope_type",
                                  "type",
                                  "rope_theta",
                                  "factor",
                                  "low_freq_factor",
                                  "high_freq_factor",
                                  "original_max_position_embeddings",
                                  "attention_factor",
                                  "beta_fast",
                                  "beta_slow",
                                  "mscale",
                                  "mscale_all_dim",
                                  "truncate",
                                  "partial_rotary_factor",
                                  "finetuned"};
  rope.type = read_rope_type(fields);
  for (const auto& [key, value] : object->items()) {
    if (!lists(kFields, key) && !is_nothing(value)) {
      refuse(fields, key, value);
    }
  }
  if (fields.number("partial_rotary_factor", 0, 1e6).value_or(1) != 1) {
    refuse(fields, "partial_rotary_factor", (*object)["partial_rotary_factor"]);
  }
  rope.theta = fields.number("rope_theta", kMinTheta, kMaxTheta).value_or(rope.theta);
  if (rope.type != RopeType::standard) {
    read_scaling(fields, model, rope, max_position);
  }
}

}  // namespace vericache
