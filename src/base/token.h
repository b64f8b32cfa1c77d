// The token id, shared by the text and the engine.
// Plain data; any thread.
#pragma once

#include <cstdint>

namespace vericache {

using TokenId = int32_t;

}  // namespace vericache
