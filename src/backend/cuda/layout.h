// How K and V lie in a bf16 head page on a GPU: so that one 16-byte read gives a thread the operands of two tensor-core
// steps. Host and device code; pure.
#pragma once

#include <cstddef>

#include "backend/kv_view.h"
#include "base/host_device.h"

namespace vericache::cuda {

// mma.sync m16n8k16 takes B with lane l = 4 n + c holding, of column n = l / 4, the k values 2c, 2c+1, 2c+8, 2c+9. A
// sum over k may take k in any order that A and B share, so a group of 32 consecutive k values is dealt out to two
// steps such that lane c's eight values are 8c .. 8c+7: step s takes 8c+4s .. 8c+4s+3.
//
// K: (key_dim / 32, 64 tokens, 32 dims). k is the dim, n the token: lane (n, c) reads 8 dims of one token.
VERICACHE_BOTH inline size_t key_index(int token, int dim) {
  return (static_cast<size_t>(dim / 32) * kPageTokens + static_cast<size_t>(token)) * 32 +
         static_cast<size_t>(dim % 32);
}
// V: (64 / 32 token groups, head_dim, 32 tokens). k is the token, n the dim: lane (n, c) reads 8 tokens of one dim.
// Offset within the V part, which begins at key_dim * 64 values.
VERICACHE_BOTH inline size_t value_index(int token, int dim, int head_dim) {
  return (static_cast<size_t>(token / 32) * static_cast<size_t>(head_dim) + static_cast<size_t>(dim)) * 32 +
         static_cast<size_t>(token % 32);
}

// The scores of a group of 32 tokens come from four n8 tiles. Column n of tile j is the token 8 (n / 2) + 2 j + n % 2,
// so that the accumulators that a lane holds (columns 2c, 2c+1 of the four tiles) are its tokens 8c .. 8c+7: the very
// operands that the product with V takes from this lane.
VERICACHE_BOTH inline int score_token(int tile, int column) {
  return column / 2 * 8 + tile % 4 * 2 + column % 2 + tile / 4 * 32;
}

}  // namespace vericache::cuda
