// Philox4x32-10 as backend/philox.h computes it, for device code: words in registers instead of an array of the host's
// library. Pure.
#pragma once

#include <cstdint>

namespace vericache::cuda {

struct PhiloxWords {
  uint32_t x, y, z, w;
};

__device__ inline PhiloxWords philox(PhiloxWords counter, uint64_t seed) {
  constexpr int kRounds = 10;
  auto key_x = static_cast<uint32_t>(seed);
  auto key_y = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.x;
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key_x, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key_y, static_cast<uint32_t>(a)};
    key_x += 0x9E3779B9u;
    key_y += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace vericache::cuda
