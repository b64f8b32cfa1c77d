// Rotation of head vectors before they are quantized (QuaRot, Ashkboos et al. 2024, section 3.2: Hadamard transforms
// spread outliers over all channels, and leave q k as it is when both are rotated; TurboQuant, Zandieh et al. 2025).
// Host and device code; pure; any thread.
#pragma once

#include "base/host_device.h"

namespace vericache {

// Channels that are mixed with each other: blocks of the largest power of two that divides the head.
VERICACHE_BOTH constexpr int rotation_block(int head_dim) {
  return head_dim & -head_dim;
}
// The smallest power of two that is not below rotation_scale().
VERICACHE_BOTH constexpr float rotation_power(int block) {
  float power = 1.0f;
  for (; block >= 4; block /= 4) {
    power *= 0.5f;
  }
  return power;
}
// What makes a Hadamard matrix of that many rows orthogonal, and its own inverse.
VERICACHE_BOTH constexpr float rotation_scale(int block) {
  const float power = rotation_power(block);
  return power * power * static_cast<float>(block) == 1.0f ? power : power * 0.70710678f;
}

// The sums of a rotation alone, in place, each rounded by round(float): in the order of rising distance, on every
// backend. x (head_dim)
template <typename Round>
void rotation_sums(float* x, int head_dim, const Round& round) {
  const int block = rotation_block(head_dim);
  for (int reach = 1; reach < block; reach *= 2) {
    for (int first = 0; first < head_dim; first += 2 * reach) {
      for (int i = first; i < first + reach; ++i) {
        const float a = x[i];
        const float b = x[i + reach];
        x[i] = round(a + b);
        x[i + reach] = round(a - b);
      }
    }
  }
}
// x (head_dim), in place.
inline void rotate(float* x, int head_dim) {
  rotation_sums(x, head_dim, [](float sum) { return sum; });
  const float scale = rotation_scale(rotation_block(head_dim));
  for (int i = 0; i < head_dim; ++i) {
    x[i] *= scale;
  }
}

// The sum of x (count, a power of two), in the order of rotate()'s first sums.
inline float rotation_sum(const float* x, int count) {
  return count == 1 ? x[0] : rotation_sum(x, count / 2) + rotation_sum(x + count / 2, count / 2);
}

}  // namespace vericache
