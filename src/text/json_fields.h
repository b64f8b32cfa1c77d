// Fields of a JSON object that somebody else wrote: each is there with the right type, or an Error says which is not.
// Pure functions, any thread.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

namespace vericache {

using Json = nlohmann::json;

// `where` names the object in messages: "tokenizer.json: model".
Json parse_json(std::string_view text, std::string_view where);
const Json& object_field(const Json& object, const char* name, std::string_view where);    // throws when absent
const Json* optional_field(const Json& object, const char* name, std::string_view where);  // null counts as absent
std::string string_field(const Json& object, const char* name, std::string_view where);
bool bool_field(const Json& object, const char* name, std::string_view where);
bool bool_field(const Json& object, const char* name, bool otherwise, std::string_view where);
int64_t int_field(const Json& object, const char* name, std::string_view where);
const Json& array_field(const Json& object, const char* name, std::string_view where);

// An integer from 0 to 2^31 - 1.
int32_t json_id(const Json& value, std::string_view where);

}  // namespace vericache
