#include "text/json_fields.h"

#include <cstdint>

namespace vericache {

Json parse_json(std::string_view text, std::string_view where) {
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    throw Error("{}: not valid JSON: {}", where, error.what());
  }
}

const Json* optional_field(const Json& object, const char* name, std::string_view where) {
  if (!object.is_object()) throw Error("{}: an object is expected, not {}", where, object.type_name());
  const auto at = object.find(name);
  return at == object.end() || at->is_null() ? nullptr : &*at;
}

const Json& object_field(const Json& object, const char* name, std::string_view where) {
  const Json* field = optional_field(object, name, where);
  if (field == nullptr) throw Error("{}: the field '{}' is missing", where, name);
  return *field;
}

std::string string_field(const Json& object, const char* name, std::string_view where) {
  const Json& field = object_field(object, name, where);
  if (!field.is_string()) throw Error("{}: '{}' is {}, not a string", where, name, field.type_name());
  return field.get<std::string>();
}

bool bool_field(const Json& object, const char* name, std::string_view where) {
  const Json& field = object_field(object, name, where);
  if (!field.is_boolean()) throw Error("{}: '{}' is {}, not true or false", where, name, field.type_name());
  return field.get<bool>();
}

bool bool_field(const Json& object, const char* name, bool otherwise, std::string_view where) {
  return optional_field(object, name, where) == nullptr ? otherwise : bool_field(object, name, where);
}

int32_t json_id(const Json& value, std::string_view where) {
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() ? value.get<uint64_t>() > INT32_MAX : value.get<int64_t>() < 0)) {
    throw Error("{}: '{}' is not an integer from 0 to {}", where, value.is_number() ? value.dump() : value.type_name(),
                INT32_MAX);
  }
  return static_cast<int32_t>(value.get<int64_t>());
}

int64_t int_field(const Json& object, const char* name, std::string_view where) {
  return json_id(object_field(object, name, where), std::string(where) + ": " + name);
}

const Json& array_field(const Json& object, const char* name, std::string_view where) {
  const Json& field = object_field(object, name, where);
  if (!field.is_array()) throw Error("{}: '{}' is {}, not a list", where, name, field.type_name());
  return field;
}

}  // namespace vericache
