// Hashes: XXH3-64 of bytes, for checksums of KV blocks and of chosen logit rows.
// Pure functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vericache {

uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed = 0);

}  // namespace vericache
