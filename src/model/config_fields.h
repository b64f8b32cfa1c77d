// ConfigFields: typed, range-checked access to one JSON object of a model's configuration.
// Belongs to one thread; the JSON must outlive it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "model/strict_json.h"

namespace vericache {

constexpr std::string_view kSupported =
    "supported are llama (2, 3.x), mistral, qwen2 (2, 2.5) and qwen3 (dense) with full attention, silu, and rope types "
    "default, linear, llama3 and yarn";

class ConfigFields {
 public:
  // `where` opens every message: "models/x/config.json".
  ConfigFields(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) {
      throw Error("{}: not a JSON object; download it again", where_);
    }
  }

  const nlohmann::json& json() const { return object_; }
  const std::string& where() const { return where_; }

  // Null if the field is absent or null: configurations write either for "the default".
  const nlohmann::json* find(std::string_view key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  bool has_key(std::string_view key) const { return object_.find(key) != object_.end(); }

  // Sizes: 0 <= low.
  std::optional<int> integer(std::string_view key, int low, int high) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    // The parser gives whole numbers from 0 to 2^64 - 1 as unsigned, larger ones as floats.
    if (!value->is_number_unsigned() || value->get<uint64_t>() < static_cast<uint64_t>(low) ||
        value->get<uint64_t>() > static_cast<uint64_t>(high)) {
      throw Error("{}: \"{}\" is {}; it must be a whole number from {} to {}", where_, key, shown(*value), low, high);
    }
    return static_cast<int>(value->get<uint64_t>());
  }

  int required_integer(std::string_view key, int low, int high) const {
    const std::optional<int> value = integer(key, low, high);
    if (!value) {
      throw Error("{}: \"{}\" is missing; take config.json from the model's repository", where_, key);
    }
    return *value;
  }

  std::optional<double> number(std::string_view key, double low, double high) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!value->is_number() || !(value->get<double>() >= low && value->get<double>() <= high)) {
      throw Error("{}: \"{}\" is {}; it must be a number from {} to {}", where_, key, shown(*value), low, high);
    }
    return value->get<double>();
  }

  bool flag(std::string_view key, bool otherwise) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) {
      return otherwise;
    }
    if (!value->is_boolean()) {
      throw Error("{}: \"{}\" is {}; it must be true or false", where_, key, shown(*value));
    }
    return value->get<bool>();
  }

  std::optional<std::string> text(std::string_view key) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!value->is_string()) {
      throw Error("{}: \"{}\" is {}; it must be a string", where_, key, shown(*value));
    }
    return value->get<std::string>();
  }

  static std::string shown(const nlohmann::json& value) { return printable(value.dump(), 80); }

 private:
  const nlohmann::json& object_;
  std::string where_;
};

template <typename List>
bool lists(const List& list, std::string_view key) {
  return std::find(list.begin(), list.end(), key) != list.end();
}

// Null, false or empty: how configurations say that a feature is off.
inline bool is_nothing(const nlohmann::json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) ||
         (value.is_string() && value.get_ref<const std::string&>().empty()) || (value.is_structured() && value.empty());
}

[[noreturn]] inline void refuse(const ConfigFields& fields, std::string_view key, const nlohmann::json& value) {
  throw Error("{}: \"{}\": {} is not supported; {}. If the model does not use the field, remove it", fields.where(),
              printable(key), ConfigFields::shown(value), kSupported);
}

}  // namespace vericache
