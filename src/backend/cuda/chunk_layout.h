// How the codes that are not plain affine ones of 2, 4 or 8 bits lie in a head page on a GPU, and codes of every format
// eight at a time. Host and device code; pure.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/cuda/packed_layout.h"
#include "backend/kv_codes.h"

namespace vericache::cuda {

// A chunked K or V part is what its codes are read with (kv_view.h: scales and minima, with nuq's levels and slots
// behind them, or a byte or a scale per token), then its codes in chunks: 32 dims of the 64 tokens, 256 bytes for each
// bit of a code, in planes, one for each binary digit of the number of bits, the widest first. What a lane 4 g + c of a
// warp reads of a chunk are 8 runs of 8 codes: run (r, x, row) are the k values 8c .. 8c + 7 of one row of the
// tensor-core tile (r, x).
//   K: k is the dim. r is the token group of 32, x the tile in it, and the row's token score_token(2 x + row, g).
//   V: k is the token. r is the tile of 16 dims, x the token group, and the row's dim 8 row + g of the tile.
//
// In a plane of 8 bits a run is two words, 2 row and 2 row + 1 of the 16 bytes of lane and tile; in one of 4 bits a
// word, 2 x + row of the 16 bytes of lane and r; in one of 2 bits half of the word 2 r + x of a lane's 16 bytes, the
// row g + 8 above row g in each half word; in one of 1 bit a quarter of the word r of a lane's 8 bytes, in the same
// manner. Pair i of a run are the k values 2i and 2i + 1, the low bits of the two half words.
//
// Affine codes of 3 bits lie in the words of those two planes, but whole, so that a shift and a mask read a pair. The
// three words of a lane and r, two of 2 bits and one of 1 bit, hold the pairs of the runs 2 x + row = 0, 1 and 2, from
// their half words' lowest bits on, then pairs 0, 1 and 2 of run 3; its last pair has the bits that are left, the
// highest of every half word.
struct Run8 {
  int chunk = 0;
  int r = 0;
  int x = 0;
  int row = 0;
  int lane = 0;
};
// The run of the dims dim .. dim + 7 of a token of K; dim: a multiple of 8.
VERICACHE_BOTH constexpr Run8 key_run(int token, int dim) {
  const int in_group = token % 32;
  const int g = in_group / 8 * 2 + in_group % 2;
  return {dim / 32, token / 32, in_group % 8 / 4, in_group % 4 / 2, 4 * g + dim % 32 / 8};
}
// The run of the tokens token .. token + 7 of a dim of V; token: a multiple of 8.
VERICACHE_BOTH constexpr Run8 value_run(int token, int dim) {
  return {dim / 32, dim % 32 / 16, token / 32, dim % 16 / 8, 4 * (dim % 8) + token % 32 / 8};
}

VERICACHE_BOTH constexpr int chunk_bytes(int bits) {
  return 256 * bits;
}
VERICACHE_BOTH constexpr int plane_in_chunk(int bits, int width) {
  return 256 * (bits & ~(2 * width - 1));
}
// Where the words of a run begin, in bytes from the chunk's first: two of them in a plane of 8 bits, one in others.
VERICACHE_BOTH constexpr int run_offset(const Run8& run, int bits, int width) {
  const int plane = plane_in_chunk(bits, width);
  return plane + (width == 8   ? (run.r * 2 + run.x) * 512 + run.lane * 16 + run.row * 8
                  : width == 4 ? run.r * 512 + run.lane * 16 + (2 * run.x + run.row) * 4
                  : width == 2 ? run.lane * 16 + (2 * run.r + run.x) * 4
                               : run.lane * 8 + run.r * 4);
}
// The same of word i of affine codes of 3 bits.
VERICACHE_BOTH constexpr int three_offset(const Run8& run, int i) {
  return i < 2 ? run_offset({run.chunk, run.r, i, 0, run.lane}, 3, 2) : run_offset(run, 3, 1);
}
// The code of planes and fp8 in pieces of the planes' widths, from the highest bits: of 8 bits and more the sign, the
// rank and 3 bits of mantissa come first, below 8 the rank, so that a shift takes each piece to its place in a bf16.
VERICACHE_BOTH constexpr uint32_t chunk_order(uint32_t code, const KvPart& part) {
  if (part.code != KvCode::plane || part.bits >= 8) {
    return code;
  }
  const int kept = part.bits - 5;
  return (code >> kept & 15u) << (kept + 1) | code >> (part.bits - 1) << kept | (code & ((1u << kept) - 1));
}
VERICACHE_BOTH constexpr uint32_t code_of_order(uint32_t order, const KvPart& part) {
  if (part.code != KvCode::plane || part.bits >= 8) {
    return order;
  }
  const int kept = part.bits - 5;
  return (order >> kept & 1u) << (part.bits - 1) | order >> (kept + 1) << kept | (order & ((1u << kept) - 1));
}

// A plane of 8 bits holds two pairs in a word. Of int8 they are the low and the high bytes of the half words. Of planes
// and fp8 the even pair lies as a bf16 does: the sign in bit 15 of its half word, rank and mantissa in bits 10 .. 4;
// and of the odd pair the rank is in bits 14 .. 11, the mantissa in bits 2 .. 0, and the sign in bit 3 of the other
// half word, so that a rotation by 4 takes sign and rank to their places and a shift by 4 the mantissa.
VERICACHE_BOTH constexpr void put_wide(uint32_t code, int value, bool as_bf16, uint32_t (&words)[2]) {
  uint32_t& word = words[value / 4];
  const int half = 16 * (value % 2);
  const bool odd = value / 2 % 2 != 0;
  if (!as_bf16) {
    word |= code << (half + (odd ? 8 : 0));
  } else if (!odd) {
    word |= (code >> 7) << (half + 15) | (code & 127u) << (half + 4);
  } else {
    word |= (code >> 7) << (16 - half + 3) | (code >> 3 & 15u) << (half + 11) | (code & 7u) << half;
  }
}
VERICACHE_BOTH constexpr uint32_t take_wide(const uint32_t (&words)[2], int value, bool as_bf16) {
  const uint32_t word = words[value / 4];
  const int half = 16 * (value % 2);
  const bool odd = value / 2 % 2 != 0;
  if (!as_bf16) {
    return word >> (half + (odd ? 8 : 0)) & 255u;
  }
  if (!odd) {
    return (word >> (half + 15) & 1u) << 7 | (word >> (half + 4) & 127u);
  }
  return (word >> (16 - half + 3) & 1u) << 7 | (word >> (half + 11) & 15u) << 3 | (word >> half & 7u);
}

// Of planes a plane of 2 bits holds the sign and a bit of the mantissa of 8 pairs, pair p = pair + 4 row: the sign in
// bit 15 - p, the other in bit 6 - p and of the last in bit 7, so that one shift by p takes both to their places in a
// bf16.
VERICACHE_BOTH constexpr uint32_t put_two(uint32_t bits, int value, const Run8& run, const KvPart& part) {
  const int half = 16 * (value % 2);
  const int p = value / 2 + 4 * run.row;
  if (part.code != KvCode::plane) {
    return bits << (half + 2 * p);
  }
  return (bits >> 1) << (half + 15 - p) | (bits & 1u) << (half + (p < 7 ? 6 - p : 7));
}
VERICACHE_BOTH constexpr uint32_t take_two(uint32_t word, int value, const Run8& run, const KvPart& part) {
  const int half = 16 * (value % 2);
  const int p = value / 2 + 4 * run.row;
  if (part.code != KvCode::plane) {
    return word >> (half + 2 * p) & 3u;
  }
  return (word >> (half + 15 - p) & 1u) << 1 | (word >> (half + (p < 7 ? 6 - p : 7)) & 1u);
}

VERICACHE_BOTH constexpr bool in_threes(const KvPart& part) {
  return part.code == KvCode::affine && part.bits == 3;
}
VERICACHE_BOTH constexpr void put_three(uint32_t code, int value, const Run8& run, uint32_t (&words)[3]) {
  const int half = 16 * (value % 2);
  const int of_four = 2 * run.x + run.row;
  const int pair = value / 2;
  if (of_four < 3) {
    words[of_four] |= code << (half + 3 * pair);
  } else if (pair < 3) {
    words[pair] |= code << (half + 12);
  } else {
    for (int i = 0; i < 3; ++i) {
      words[i] |= (code >> i & 1u) << (half + 15);
    }
  }
}
// The four pairs of a run, one behind the other from the half words' lowest bits on.
VERICACHE_BOTH constexpr uint32_t run_of_threes(const uint32_t (&words)[3], const Run8& run) {
  const int of_four = 2 * run.x + run.row;
  if (of_four < 3) {
    return of_four == 0 ? words[0] : of_four == 1 ? words[1] : words[2];
  }
  uint32_t pairs = 0;
  for (int i = 0; i < 3; ++i) {
    pairs |= (words[i] >> 12 & 0x00070007u) << (3 * i) | (words[i] >> 15 & 0x00010001u) << (9 + i);
  }
  return pairs;
}

// The words of a run, plane by plane; of shared words this run's bits alone.
struct RunWords {
  uint32_t three[3] = {};  // of affine codes of 3 bits: 2 r and 2 r + 1 of the plane of 2 bits, r of that of 1 bit
  uint32_t wide[2] = {};   // 8 bits
  uint32_t four = 0;
  uint32_t two = 0;
  uint32_t one = 0;
};
VERICACHE_BOTH constexpr int pair_place(int value, int width) {
  return width * (value / 2) + 16 * (value % 2);
}
VERICACHE_BOTH constexpr RunWords pack_run(const uint32_t (&code)[8], const KvPart& part, const Run8& run) {
  RunWords out;
  const int low = part.bits % 8;  // bits below a plane of 8
  for (int i = 0; i < 8; ++i) {
    if (in_threes(part)) {
      put_three(code[i], i, run, out.three);
      continue;
    }
    const uint32_t order = chunk_order(code[i], part);
    if ((part.bits & 8) != 0) {
      put_wide(order >> low, i, part.code != KvCode::int8, out.wide);
    }
    if ((part.bits & 4) != 0) {
      out.four |= (order >> (low % 4) & 15u) << pair_place(i, 4);
    }
    if ((part.bits & 2) != 0) {
      out.two |= put_two(order >> (low % 2) & 3u, i, run, part);
    }
    if ((part.bits & 1) != 0) {
      out.one |= (order & 1u) << (pair_place(i, 1) + 4 * (2 * run.x + run.row));
    }
  }
  return out;
}
VERICACHE_BOTH constexpr void unpack_run(const RunWords& words, const KvPart& part, const Run8& run,
                                         uint32_t (&code)[8]) {
  const uint32_t threes = in_threes(part) ? run_of_threes(words.three, run) : 0;
  for (int i = 0; i < 8; ++i) {
    if (in_threes(part)) {
      code[i] = threes >> pair_place(i, 3) & 7u;
      continue;
    }
    uint32_t order = 0;
    if ((part.bits & 8) != 0) {
      order = take_wide(words.wide, i, part.code != KvCode::int8);
    }
    if ((part.bits & 4) != 0) {
      order = order << 4 | (words.four >> pair_place(i, 4) & 15u);
    }
    if ((part.bits & 2) != 0) {
      order = order << 2 | take_two(words.two, i, run, part);
    }
    if ((part.bits & 1) != 0) {
      order = order << 1 | (words.one >> (pair_place(i, 1) + 4 * (2 * run.x + run.row)) & 1u);
    }
    code[i] = code_of_order(order, part);
  }
}

// Words and scales lie on their own boundaries; a GPU that is not told so reads them byte by byte.
VERICACHE_BOTH inline uint32_t word_at(const std::byte* at) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint32_t*>(at);
#else
  uint32_t word;
  memcpy(&word, at, sizeof(word));
  return word;
#endif
}
VERICACHE_BOTH inline uint32_t half_at(const std::byte* at) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint16_t*>(at);
#else
  uint16_t half;
  memcpy(&half, at, sizeof(half));
  return half;
#endif
}
VERICACHE_BOTH inline RunWords read_run(const std::byte* chunk, const KvPart& part, const Run8& run) {
  RunWords out;
  if (in_threes(part)) {
    for (int i = 0; i < 3; ++i) {
      out.three[i] = word_at(chunk + three_offset(run, i));
    }
    return out;
  }
  if ((part.bits & 8) != 0) {
    out.wide[0] = word_at(chunk + run_offset(run, part.bits, 8));
    out.wide[1] = word_at(chunk + run_offset(run, part.bits, 8) + 4);
  }
  if ((part.bits & 4) != 0) {
    out.four = word_at(chunk + run_offset(run, part.bits, 4));
  }
  if ((part.bits & 2) != 0) {
    out.two = word_at(chunk + run_offset(run, part.bits, 2));
  }
  if ((part.bits & 1) != 0) {
    out.one = word_at(chunk + run_offset(run, part.bits, 1));
  }
  return out;
}

// Eight codes of a packed part of any format but bf16. codes_at: the part's first code, behind its group bytes.
VERICACHE_BOTH inline void plain_codes(const std::byte* codes_at, int bits, int head_dim, const CodePlace (&place)[8],
                                       uint32_t (&code)[8]) {
  const int width = bits == 2 ? 2 : 4;
  for (int i = 0; i < 8; ++i) {
    code[i] = word_at(codes_at + place[i].word * 4) >> place[i].shift & ((1u << width) - 1);
    if (bits == 8) {
      const uint32_t low = word_at(codes_at + plane_bytes(4, head_dim) + place[i].word * 4);
      code[i] = code[i] << 4 | (low >> place[i].shift & 15u);
    }
  }
}

// Codes of the dims dim .. dim + 7 (dim a multiple of 8) of a token of K; part: where the packed K part begins.
VERICACHE_BOTH inline void key_codes(const std::byte* part, const KvPart& format, int head_dim, int token, int dim,
                                     uint32_t (&code)[8]) {
  const std::byte* codes_at = part + group_bytes(format, head_dim, head_dim);
  if (chunked(format)) {
    const Run8 run = key_run(token, dim);
    unpack_run(read_run(codes_at + run.chunk * chunk_bytes(format.bits), format, run), format, run, code);
    return;
  }
  CodePlace place[8];
  for (int i = 0; i < 8; ++i) {
    place[i] = key_place(token, dim + i, format.bits == 2 ? 2 : 4);
  }
  plain_codes(codes_at, format.bits, head_dim, place, code);
}
// Codes of the tokens token .. token + 7 (token a multiple of 8) of a dim of V; part: where the packed V part begins.
VERICACHE_BOTH inline void value_codes(const std::byte* part, const KvPart& format, int head_dim, int token, int dim,
                                       uint32_t (&code)[8]) {
  const std::byte* codes_at = part + group_bytes(format, head_dim, kPageTokens);
  if (chunked(format)) {
    const Run8 run = value_run(token, dim);
    unpack_run(read_run(codes_at + run.chunk * chunk_bytes(format.bits), format, run), format, run, code);
    return;
  }
  CodePlace place[8];
  for (int i = 0; i < 8; ++i) {
    place[i] = value_place(token + i, dim, format.bits == 2 ? 2 : 4);
  }
  plain_codes(codes_at, format.bits, head_dim, place, code);
}

// What a token's plane and fp8 codes are read with: its base, the same for K and V parts.
VERICACHE_BOTH inline uint32_t base_of(const std::byte* part, int token) {
  return static_cast<uint32_t>(part[token]);
}
// Scale and minimum of an affine group (K: dim, of head_dim; V: token, of 64): two rows of bf16.
struct AffineBits {
  uint32_t scale = 0;  // bits of a bf16
  uint32_t minimum = 0;
};
VERICACHE_BOTH inline AffineBits affine_of(const std::byte* part, int group, int groups) {
  return {half_at(part + group * 2), half_at(part + (groups + group) * 2)};
}

// Levels of a nuq part, behind its affine groups, and its slots behind them.
VERICACHE_BOTH inline const uint8_t* levels_of(const std::byte* part, int groups) {
  return reinterpret_cast<const uint8_t*>(part) + 4 * groups;
}
VERICACHE_BOTH inline const uint32_t* slots_of(const std::byte* part, int groups) {
  return reinterpret_cast<const uint32_t*>(part + 4 * groups + kNuqLevels);
}

}  // namespace vericache::cuda
