// Random weights: every value a function of (seed, row, column), the same on every backend.
// Pure; any thread.
#pragma once

#include <cstdint>

#include "backend/philox.h"
#include "base/bf16.h"

namespace vericache {

// Uniform in (-scale, scale). --fmad=false and -ffp-contract=off round it alike everywhere.
VERICACHE_BOTH inline float random_uniform(uint32_t word, float scale) {
  return (static_cast<float>(word) * 0x1p-31f - 1.0f) * scale;
}

// Philox words of the row's columns, four a block.
inline bf16 random_value(uint64_t seed, int row, int col, float scale) {
  const auto column = static_cast<uint32_t>(col);
  const uint32_t word = philox4x32({column / 4, static_cast<uint32_t>(row), 0, 0},
                                   {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)})[column % 4];
  return to_bf16(random_uniform(word, scale));
}

}  // namespace vericache
