// How affine codes lie in a head page on a GPU: so that one 16-byte read and a few integer operations give a thread the
// operands of tensor-core steps. Host and device code; pure.
#pragma once

#include "backend/cuda/layout.h"

namespace vericache::cuda {

// An affine K or V part of 2, 4 or 8 bits of a head page is its scales (bf16, one per channel of K or token of V), its
// minima (the same), then its codes in planes. 4 bits: one plane. 8 bits: two planes of 4 bits, the high halves of the
// codes first. 2 bits: one plane of its own kind.
//
// A plane is made of rows of 512 bytes: 32 lanes of a warp, 4 words of 32 bits each. A word holds pairs of codes, each
// pair as the low bits of the word's two halves, one pair `bits` above the other: (word >> 4 i) & 0x000f000f is pair i,
// and an OR with the exponent of 128 makes of it two bf16 values 128 + code. Pair i of lane 4 g + c are the k values
// 8c + 2i, 8c + 2i + 1 of a group of 32 (layout.h), so that pairs 2s, 2s + 1 are the operands of step s.
//
// K, 4 bits: (key_dim / 32, 2 token groups of 32, 32 lanes, 4 words). k is the dim; word b is the token
//            score_token(b, g) of the group. The words 2j, 2j + 1 are rows g and g + 8 of the tile j of 16 tokens.
// K, 2 bits: (key_dim / 32, 32 lanes, 4 words): word j holds both rows of tile j, row g + 8 in pairs 4 .. 7.
// V, 4 bits: (head_dim / 16, 32 lanes, 4 words). k is the token; word 2 u + h is of token group u the dim g + 8 h.
// V, 2 bits: (head_dim / 32, 32 lanes, 4 words): word 2 t + u is of tile t (16 dims) token group u, dim g + 8 in pairs
//            4 .. 7.
struct CodePlace {
  int word = 0;   // of 32 bits, in its plane
  int shift = 0;  // of the code in the word
};

VERICACHE_BOTH constexpr int pair_shift(int value, int bits, int row) {
  return bits * (value / 2 + 4 * row) + 16 * (value % 2);
}

// plane_bits: 2 or 4.
VERICACHE_BOTH constexpr CodePlace key_place(int token, int dim, int plane_bits) {
  const int in_group = token % 32;
  const int g = in_group / 8 * 2 + in_group % 2;
  const int b = in_group % 8 / 2;
  const int lane = 4 * g + dim % 32 / 8;
  if (plane_bits == 4) {
    return {((dim / 32 * 2 + token / 32) * 32 + lane) * 4 + b, pair_shift(dim % 8, 4, 0)};
  }
  return {(dim / 32 * 32 + lane) * 4 + token / 32 * 2 + b / 2, pair_shift(dim % 8, 2, b % 2)};
}
VERICACHE_BOTH constexpr CodePlace value_place(int token, int dim, int plane_bits) {
  const int lane = 4 * (dim % 8) + token % 32 / 8;
  const int h = dim % 16 / 8;
  if (plane_bits == 4) {
    return {(dim / 16 * 32 + lane) * 4 + token / 32 * 2 + h, pair_shift(token % 8, 4, 0)};
  }
  return {(dim / 32 * 32 + lane) * 4 + dim / 16 % 2 * 2 + token / 32, pair_shift(token % 8, 2, h)};
}

// K or V of a head page as it is read: pieces of equal size one after the other, before the first what its codes are
// read with. A packed piece is a plane, or some chunks (chunk_layout.h); a bf16 piece at most 4 KiB of K (32 dims of
// the 64 tokens) or V (some dims of 32 tokens).
struct Pieces {
  int count = 0;
  int bytes = 0;        // of one piece
  int group_bytes = 0;  // before the first
};

VERICACHE_BOTH constexpr int plane_bytes(int bits, int head_dim) {
  return kPageTokens * head_dim / (bits == 2 ? 4 : 2);
}
// Whether a part lies in chunks (chunk_layout.h).
VERICACHE_BOTH constexpr bool chunked(const KvPart& part) {
  return !part.exact() && (part.by_token() || part.code == KvCode::nuq || part.bits == 3 || part.bits == 6);
}
// Chunks of 32 dims that one piece holds: two where that gives whole pieces of at most 4 KiB.
VERICACHE_BOTH constexpr int piece_chunks(int bits, int head_dim) {
  return head_dim % 64 == 0 && bits <= 8 ? 2 : 1;
}
// Of a packed part that has `groups` affine groups.
VERICACHE_BOTH constexpr Pieces packed_pieces(const KvPart& part, int head_dim, int groups) {
  if (chunked(part)) {
    const int chunks = piece_chunks(part.bits, head_dim);
    return {head_dim / 32 / chunks, chunks * 256 * part.bits, group_bytes(part, head_dim, groups)};
  }
  return {part.bits == 8 ? 2 : 1, plane_bytes(part.bits, head_dim), group_bytes(part, head_dim, groups)};
}
VERICACHE_BOTH constexpr Pieces key_pieces(const KvPart& part, int head_dim) {
  return part.exact() ? Pieces{head_dim / 32, kPageTokens * 32 * 2, 0} : packed_pieces(part, head_dim, head_dim);
}
// Dims of a bf16 piece of V.
VERICACHE_BOTH constexpr int value_piece_dims(int head_dim) {
  return head_dim <= 64 ? head_dim : head_dim / 2;
}
VERICACHE_BOTH constexpr Pieces value_pieces(const KvPart& part, int head_dim) {
  return part.exact() ? Pieces{2 * head_dim / value_piece_dims(head_dim), value_piece_dims(head_dim) * 32 * 2, 0}
                      : packed_pieces(part, head_dim, kPageTokens);
}
VERICACHE_BOTH constexpr int bytes_of(const Pieces& pieces) {
  return pieces.count * pieces.bytes + pieces.group_bytes;
}

}  // namespace vericache::cuda
