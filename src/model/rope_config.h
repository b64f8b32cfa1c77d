// The rotary part of config.json, in the forms of transformers 4 and 5.
// Pure functions: any thread.
#pragma once

#include "model/config_fields.h"
#include "model/rope.h"

namespace vericache {

constexpr int kMaxPosition = 1 << 24;  // tokens

// Fills `rope`; yarn may raise `max_position` to the stretched context. Error for an unknown type, field or range.
void read_rope(const ConfigFields& model, Rope& rope, int& max_position);

}  // namespace vericache
