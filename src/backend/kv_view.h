// How attention sees KV: pages of 64 tokens per head, in one of the storage formats.
// Plain data; any thread may read it.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/bf16.h"
#include "base/host_device.h"

namespace vericache {

inline constexpr int kPageTokens = 64;

// Model dimensions that fix the size of KV.
struct KvShape {
  int layers = 0;
  int kv_heads = 0;
  int head_dim = 0;  // a multiple of 16
  // Keys are the K dimension of a product, which runs in steps of 32 (one matrix-unit tile).
  VERICACHE_BOTH constexpr int key_dim() const { return (head_dim + 31) / 32 * 32; }
  friend bool operator==(const KvShape&, const KvShape&) = default;
};

// How codes stand for values. Keys and values of a format share it; their bits may differ.
enum class KvCode : uint8_t {
  affine,  // minimum + code * scale per channel of K and token of V (KIVI, Liu et al. 2024): 2, 3, 4, 6 or 8 bits
  plane,   // the leading bits of the bf16 itself, its exponent counted from the token's largest: 6, 7, 8 or 9 bits
  fp8,     // sign, 4 bits of exponent and 3 of mantissa, a power of two per token (Micikevicius et al. 2022): 8 bits
  int8,    // code * scale per token, symmetric: 8 bits
  nuq,     // minimum + level[code] * scale, groups as affine; outliers apart (KVQuant, nuq_codes.h): 2, 3 or 4 bits
};

// K or V of a format. 16 bits: bf16 as computed, whatever the code.
struct KvPart {
  int bits = 16;
  KvCode code = KvCode::affine;
  int outliers = 0;  // thousandths of the values that nuq keeps apart, kMostOutliers at most
  constexpr KvPart() = default;
  VERICACHE_BOTH constexpr explicit KvPart(int bits, KvCode code = KvCode::affine, int outliers = 0)
      : bits(bits), code(code), outliers(outliers) {}
  VERICACHE_BOTH constexpr bool exact() const { return bits == 16; }
  // Codes of one token of one head share what they are read with; of K, those of a channel do if not.
  VERICACHE_BOTH constexpr bool by_token() const { return code != KvCode::affine && code != KvCode::nuq; }
};
inline constexpr int kMostOutliers = 30;
inline constexpr int kNuqLevels = 16;  // bytes of the levels of a part, whatever its bits

// Which pages of past a draft step reads: per sequence and KV head those whose keys may give the largest scores (Quest,
// Tang et al. 2024, sections 3.2 and 3.3): of each query head the most that a key within the page's bounds can score,
// summed over the heads of the group. Ties fall to the later page. Full passes read every page.
struct PageChoice {
  bool bounded = false;  // a choice is made; head pages end with the bounds of their keys
  double budget = 1;     // a share of the head's pages (up to 1) or tokens (above 1), a page at least
  int dense_layers = 0;  // the first layers of the model, which read every page

  VERICACHE_BOTH constexpr bool in_layer(int layer) const { return bounded && layer >= dense_layers; }
  // How many of `held` pages are read.
  VERICACHE_BOTH constexpr int pages_of(int held) const {
    const double wanted = budget <= 1 ? budget * held : budget / kPageTokens;
    if (wanted >= held) {
      return held;
    }
    const int whole = static_cast<int>(wanted);
    return whole < 1 || whole < wanted ? whole + 1 : whole;
  }
  auto operator<=>(const PageChoice&) const = default;
};

inline constexpr int kMostLdlqBits = 4;  // keys of more bits are near enough to themselves

// How the keys and values of a head page are stored.
struct KvFormat {
  int key_bits = 16;
  int value_bits = 16;
  KvCode code = KvCode::affine;
  bool rotated = false;  // K and V stand for head vectors that were rotated (rotation.h)
  int outliers = 0;      // of nuq, as KvPart says
  PageChoice choice{};
  VERICACHE_BOTH constexpr KvPart key() const { return KvPart(key_bits, code, outliers); }
  VERICACHE_BOTH constexpr KvPart value() const { return KvPart(value_bits, code, outliers); }
  // Whether keys are rounded by LDLQ (RoundingArgs in kernels.h).
  VERICACHE_BOTH constexpr bool ldlq() const { return rotated && key_bits <= kMostLdlqBits; }
  // Whether a page begins with its keys and values as computed; bounds may follow.
  bool exact() const { return key_bits == 16 && value_bits == 16; }
  auto operator<=>(const KvFormat&) const = default;
};

// A head page holds 64 tokens of one layer and one KV head: first K, then V. Its sizes are the same on every backend;
// how the values lie in it is the backend's own (CUDA: backend/cuda/layout.h, packed_layout.h and chunk_layout.h). On
// the CPU:
//
// bf16 layout, that of a packed matrix panel, so that the matrix units read it as it lies:
//   K: (64 / 16 token panels, key_dim / 2, 16 tokens, 2)   element (t, d) at ((t/16 * key_dim/2 + d/2) * 16 + t%16) * 2
//   + d%2 V: (head_dim / 16 panels, 64 / 2, 16 dims, 2)          element (t, d) at ((d/16 * 32 + t/2) * 16 + d%16) * 2
//   + t%2
// A panel row is 16 lanes of two values: (d, d+1) of one token for K, (t, t+1) of one dim for V.
//
// Quantized layout, per K or V part: codes of all panel rows, then what they are read with (kv_codes.h):
//   affine: per value index of a pair (K: channel, key_dim of them; V: token, 64 of them) a bf16 scale and a bf16
//   minimum; plane, fp8: per token a byte, the largest exponent; int8: per token a bf16 scale. nuq: as affine, then
//   kNuqLevels bytes, the levels, then a fixed number of slots of 4 bytes, the outliers (nuq_codes.h).
// The codes lie in planes, one for each binary digit of `bits`, the widest first: 6 bits are a plane of the 4 high bits
// and a plane of the 2 low ones. Each holds all panel rows in the order of the bf16 layout:
//   8 bits: 16 lanes x 16 bits per row, low byte the first of the pair.
//   4 bits: 16 lanes x 8 bits per row, low nibble the first of the pair.
//   2 bits: 16 lanes x 8 bits per two rows (2r, 2r+1): bits 0-1 and 2-3 the pair of row 2r, 4-5 and 6-7 that of row
//   2r+1.
//   1 bit: 16 lanes x 8 bits per four rows in the same manner.
// Slots for outliers of a part of `dims` channels: four of them are 16 bytes, which a GPU reads at once.
VERICACHE_BOTH constexpr int outlier_slots(const KvPart& part, int dims) {
  return part.exact() ? 0 : (kPageTokens * dims * part.outliers + 3999) / 4000 * 4;
}
VERICACHE_BOTH constexpr int group_bytes(const KvPart& part, int dims, int affine_groups) {
  return part.exact()                ? 0
         : part.code == KvCode::nuq  ? 4 * affine_groups + kNuqLevels + 4 * outlier_slots(part, dims)
         : !part.by_token()          ? 4 * affine_groups
         : part.code == KvCode::int8 ? 2 * kPageTokens
                                     : kPageTokens;
}
VERICACHE_BOTH constexpr size_t part_bytes(const KvPart& part, int dims, int affine_groups) {
  return static_cast<size_t>(kPageTokens) * static_cast<size_t>(dims) / 8 * static_cast<size_t>(part.bits) +
         static_cast<size_t>(group_bytes(part, dims, affine_groups));
}
VERICACHE_BOTH constexpr size_t key_page_bytes(const KvPart& part, const KvShape& shape) {
  return part_bytes(part, shape.key_dim(), shape.key_dim());
}
VERICACHE_BOTH constexpr size_t value_page_bytes(const KvPart& part, const KvShape& shape) {
  return part_bytes(part, shape.head_dim, kPageTokens);
}
// Behind K and V, where the format chooses pages: of each run of kBoundTokens keys as they are in the full KV per
// channel the smallest and then per channel the largest, (kBoundRuns, 2, key_dim) bf16. A run that holds no token has
// the bounds of the run before it. Shorter runs bound closer, and are more to read beside the pages that are chosen.
inline constexpr int kBoundTokens = 32;
inline constexpr int kBoundRuns = kPageTokens / kBoundTokens;
VERICACHE_BOTH constexpr size_t key_bounds_bytes(const KvShape& shape) {
  return sizeof(bf16) * 2 * kBoundRuns * static_cast<size_t>(shape.key_dim());
}
inline size_t key_bounds_offset(const KvFormat& format, const KvShape& shape) {
  return key_page_bytes(format.key(), shape) + value_page_bytes(format.value(), shape);
}
inline size_t head_page_bytes(const KvFormat& format, const KvShape& shape) {
  return key_bounds_offset(format, shape) + (format.choice.bounded ? key_bounds_bytes(shape) : 0);
}
// The order in which keys are compared for their bounds: that of their bits as signed magnitudes, so that zeros and
// NaN too have one place everywhere. Turns a bf16 into a 16-bit integer that rises with it, and back.
VERICACHE_BOTH constexpr int16_t rising_bits(uint16_t bits) {
  return static_cast<int16_t>(bits ^ ((bits >> 15) != 0 ? 0x7fffu : 0u));
}
VERICACHE_BOTH constexpr uint16_t bits_of_rising(int16_t rising) {
  const auto bits = static_cast<uint16_t>(rising);
  return static_cast<uint16_t>(bits ^ ((bits >> 15) != 0 ? 0x7fffu : 0u));
}
// A page: all KV heads of one layer, bf16, head pages one after the other. The unit of the full KV, the tail and the
// wire.
inline size_t page_bytes(const KvShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * head_page_bytes(KvFormat{}, shape);
}

inline size_t key_index(int token, int dim, const KvShape& shape) {
  return ((static_cast<size_t>(token / 16) * static_cast<size_t>(shape.key_dim() / 2) + static_cast<size_t>(dim / 2)) *
              16 +
          static_cast<size_t>(token % 16)) *
             2 +
         static_cast<size_t>(dim % 2);
}
inline size_t value_index(int token, int dim) {
  return ((static_cast<size_t>(dim / 16) * (kPageTokens / 2) + static_cast<size_t>(token / 2)) * 16 +
          static_cast<size_t>(dim % 16)) *
             2 +
         static_cast<size_t>(token % 2);
}

// Copies one token of one head, K and V, between bf16 head pages of addressable memory.
inline void copy_token(const std::byte* source, int source_token, std::byte* target, int target_token,
                       const KvShape& shape) {
  const auto* from = reinterpret_cast<const bf16*>(source);
  auto* to = reinterpret_cast<bf16*>(target);
  for (int d = 0; d < shape.key_dim(); d += 2) {
    std::memcpy(to + key_index(target_token, d, shape), from + key_index(source_token, d, shape), 2 * sizeof(bf16));
  }
  const size_t values = static_cast<size_t>(kPageTokens) * static_cast<size_t>(shape.key_dim());
  for (int d = 0; d < shape.head_dim; ++d) {
    to[values + value_index(target_token, d)] = from[values + value_index(source_token, d)];
  }
}

// KV of one sequence and one layer. Heads may hold different tokens and different counts; pages are full except a
// head's last.
struct KvView {
  KvFormat format;
  std::byte* const* head_pages = nullptr;  // (kv_heads, page_stride)
  int page_stride = 0;
  const int* tokens = nullptr;  // (kv_heads): tokens held; null = none
  std::byte* head_page(int head, int page) const { return head_pages[head * page_stride + page]; }
};

// What a row attends to: past, then tail. Every past token precedes every row. The tail is bf16 and holds the tokens
// from the absolute position tail_position on, which is a multiple of 64 when past is the full KV; a row sees those up
// to its own.
struct LayerKv {
  KvView past;
  KvView tail;
  int tail_position = 0;
};

}  // namespace vericache
