// The checksum of a block of memory: 64 bits in which every flipped bit and every moved word shows. Integer sums that
// do not depend on their order, so that any number of threads may share a block. Host and device code; pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "backend/philox.h"

namespace vericache::cuda {

// The share of the 16-byte vector at `index`. Both words pass through bijections (xor with a key, odd multipliers,
// xor-shifts), so a change within one word always changes the sum. The key holds each word to its place, the
// multipliers tell the two words of a vector apart.
VERICACHE_BOTH inline uint64_t checksum_share(uint64_t first, uint64_t second, uint32_t index) {
  const uint64_t key = (uint64_t{index} + 1) * 0x9E3779B97F4A7C15u;
  first = (first ^ key) * 0xBF58476D1CE4E5B9u;
  first = (first ^ first >> 32) * 0x94D049BB133111EBu;
  second = (second ^ key) * 0xD6E8FEB86659FD93u;
  second = (second ^ second >> 32) * 0xC2B2AE3D27D4EB4Fu;
  return (first ^ first >> 32) + (second ^ second >> 32);
}

VERICACHE_BOTH inline uint64_t finish_checksum(uint64_t sum, uint64_t bytes) {
  sum = (sum ^ bytes) * 0xBF58476D1CE4E5B9u;
  return sum ^ sum >> 32;
}

// The same function of any memory; the last vector is padded with zeros.
inline uint64_t checksum_of(const void* data, size_t bytes) {
  const auto* at = static_cast<const std::byte*>(data);
  uint64_t sum = 0;
  for (size_t done = 0; done < bytes; done += 16) {
    uint64_t words[2] = {};
    std::memcpy(words, at + done, bytes - done < 16 ? bytes - done : 16);
    sum += checksum_share(words[0], words[1], static_cast<uint32_t>(done / 16));
  }
  return finish_checksum(sum, bytes);
}

}  // namespace vericache::cuda
