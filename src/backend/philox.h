// Philox4x32-10: a counter-based random generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
// section 3.3). Pure; safe from any thread, and in device code.
#pragma once

#include <array>
#include <cstdint>

#include "base/host_device.h"

namespace vericache {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

// The counter becomes its random words. Plain arrays: device code cannot call the members of std::array.
VERICACHE_BOTH inline void philox_rounds(uint32_t (&counter)[4], uint32_t key_low, uint32_t key_high) {
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key_low;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key_high;
    counter[3] = static_cast<uint32_t>(a);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

inline std::array<uint32_t, 4> philox4x32(PhiloxCounter counter, PhiloxKey key) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox_rounds(words, key[0], key[1]);
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace vericache
