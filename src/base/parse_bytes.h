// Sizes as people write them in flags: "64Mi", "1.5G", "1000000", "auto".
// Pure functions; any thread.
#pragma once

#include <cstddef>
#include <string_view>

namespace vericache {

// "auto" and "0" are 0. UsageError naming the flag.
size_t parse_bytes(std::string_view text, std::string_view flag);

}  // namespace vericache
