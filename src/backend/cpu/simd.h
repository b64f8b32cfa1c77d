// What the CPU kernels are made of: one matrix primitive and a few row operations, per instruction class. Pure
// functions over caller-owned memory; any thread. Every one treats a row without looking at its neighbours.
#pragma once

#include <cstddef>

#include "backend/cpu/cpu_kernels.h"
#include "base/bf16.h"

namespace vericache {

inline constexpr int kPanel =
    16;  // outputs in a panel row: 16 lanes of two bf16 are one cache line, one zmm, one AMX B-tile row
inline constexpr int kMaxHeadDim = 512;

// C (rows, 16 panels) float = [C +] A (rows, 2 k_pairs) bf16 x B, where B is `panels` panels of (k_pairs, 16, 2) bf16
// that lie panel_stride values apart. k_pairs is a multiple of 16. Each element of C is one sum with one accumulator
// over k in rising order whatever rows and panels are; cutting K into calls with accumulate gives the same bits as one
// call.
using PanelProduct = void (*)(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs,
                              int panels, float* c, size_t ldc, bool accumulate, const bf16* next);

// Inlined by force: GCC takes a function that only fetches ahead for one without effect and drops its calls.
[[gnu::always_inline]] inline void prefetch_line(const void* at) {
  __builtin_prefetch(at);
}

// For implementations whose inner loop does not fetch `next` itself.
[[gnu::always_inline]] inline void prefetch_panels(const bf16* next, size_t panel_stride, int k_pairs, int panels) {
  for (int p = 0; next != nullptr && p < panels; ++p) {
    for (int k = 0; k < k_pairs; ++k) {
      prefetch_line(next + static_cast<size_t>(p) * panel_stride + k * 2 * kPanel);
    }
  }
}

// Online softmax of stacked query rows over pages of 64 tokens (Milakov & Gimelshein 2018), in base 2: score2 = log2(e)
// * scale * q.k.
struct SoftmaxRows {
  float* max = nullptr;  // (rows): running maximum of score2
  float* sum = nullptr;  // (rows, 16): running sum of weights, one partial sum per lane
  float* acc = nullptr;  // (rows, head_dim): running weighted sum of values
  int head_dim = 0;
};

struct RowOps {
  void (*add)(const float* x, int dim, float* y);
  void (*rms_norm)(const float* x, const float* weight, float eps, int dim, bf16* out);  // writes padded_dim(dim)
  void (*silu_mul)(const float* gate, const float* up, int dim, bf16* out);              // writes padded_dim(dim)
  // One head: x + bias, RMSNorm, rotate-half RoPE; null skips a step. out (head_dim) bf16.
  void (*finish_head)(const float* x, const float* bias, const float* norm, float eps, const float* cos,
                      const float* sin, int head_dim, bf16* out);
  // scores (rows, 64) of q.k, of which the first visible[r] count, become weights (rows, 64) bf16, and state's max, sum
  // and acc are brought to the new maximum; sum gains the weights, acc is left for the product with V.
  void (*softmax_page)(const float* scores, int rows, const int* visible, float scale2, bf16* weights,
                       const SoftmaxRows& state);
  // total = total + split: both (max (rows), sum, acc); total's sum is (rows), not per lane.
  void (*fold_split)(const SoftmaxRows& split, int rows, const SoftmaxRows& total);
  void (*divide)(const float* acc, float sum, int dim, bf16* out);  // out (dim) = acc / sum
  // mass[t] += 2^(scores[r][t] * scale2 - log_sum_exp2[r]) over the visible tokens of each row, rows in rising order.
  void (*mass_page)(const float* scores, int rows, const int* visible, float scale2, const float* log_sum_exp2,
                    float* mass);
  // The same with the larger of mass[t] and the weight instead of their sum.
  void (*largest_page)(const float* scores, int rows, const int* visible, float scale2, const float* log_sum_exp2,
                       float* mass);
  void (*larger)(const float* x, int dim, float* y);  // y = max(x, y)
  // Of each of the queries (rows, dim) the most that q.k can be for any key within one of the bounds of a page
  // (kv_view.h), summed over the queries. dim is a multiple of 32.
  float (*bound_page)(const bf16* q, int rows, int dim, const bf16* bounds);
};

// One part (K or V) of a head page: `panels` panels of `pairs` rows of 16 lanes of two values. Layouts: kv_view.h.
struct PartLayout {
  KvPart part;
  int panels = 0;
  int pairs = 0;
  bool keys = false;  // lanes are tokens and a pair is two channels; of values, the other way round
  size_t rows() const { return static_cast<size_t>(panels) * static_cast<size_t>(pairs); }
  size_t code_bytes() const { return rows() * 4 * static_cast<size_t>(part.bits); }
};
inline PartLayout key_layout(const KvFormat& format, const KvShape& shape) {
  return {format.key(), kPageTokens / kPanel, shape.key_dim() / 2, true};
}
inline PartLayout value_layout(const KvFormat& format, const KvShape& shape) {
  return {format.value(), shape.head_dim / kPanel, kPageTokens / 2, false};
}

// Where the plane of `width` bits (1, 2, 4 or 8) of the codes begins, and in it the 16 bytes or more of row `row`.
inline size_t plane_offset(const PartLayout& layout, int width) {
  return layout.rows() * 4 * static_cast<size_t>(layout.part.bits & ~(2 * width - 1));
}
inline size_t row_offset(int width, int row) {
  return width == 8 ? static_cast<size_t>(row) * 32 : static_cast<size_t>(row * width / 4) * 16;
}
// How far up in their byte the codes of a row stand, where rows share bytes.
inline int row_shift(int width, int row) {
  return width == 2 ? 4 * (row % 2) : width == 1 ? 2 * (row % 4) : 0;
}

// Fetches what the rows of one pair will need of `next`, once per cache line.
[[gnu::always_inline]] inline void prefetch_pair(const std::byte* next, int bits, int panels, int pairs, int pair) {
  if (next == nullptr) {
    return;
  }
  const size_t row_bytes = static_cast<size_t>(bits) * 4;
  for (int panel = 0; panel < panels && pair % (16 / bits) == 0; ++panel) {
    prefetch_line(next + static_cast<size_t>(panel * pairs + pair) * row_bytes);
  }
  if (pair % 8 == 0) {
    prefetch_line(next + static_cast<size_t>(panels * pairs) * row_bytes + static_cast<size_t>(pair) * 8);
  }
}
// The same for codes of several planes: an even share of the part per pair.
[[gnu::always_inline]] inline void prefetch_share(const std::byte* next, size_t bytes, int pairs, int pair) {
  const size_t begin = bytes * static_cast<size_t>(pair) / static_cast<size_t>(pairs) / 64;
  const size_t end = bytes * static_cast<size_t>(pair + 1) / static_cast<size_t>(pairs) / 64;
  for (size_t line = begin; next != nullptr && line < end; ++line) {
    prefetch_line(next + line * 64);
  }
}

// How the keys of a head are rounded: its part of RoundingArgs::matrix, (dims, dims); null: to the nearest code.
struct HeadRounding {
  const bf16* matrix = nullptr;
  int dims = 0;
};

struct PartOps {
  // Lanes from lane_limit on (counted over the panels) and value indices from value_limit on are absent: their codes
  // are zero. rounding: of affine codes of keys.
  void (*quantize)(const bf16* source, const PartLayout& layout, int lane_limit, int value_limit,
                   const HeadRounding& rounding, std::byte* out);
  // `next`, if not null, is the part that will be read after this one; it is fetched as the work goes.
  void (*dequantize)(const std::byte* source, const PartLayout& layout, bf16* out, const std::byte* next);
};
struct QuantOps {
  PartOps affine;
  PartOps by_token;  // plane, fp8, int8
  PartOps nuq;
  const PartOps& of(const KvPart& part) const {
    return part.by_token() ? by_token : part.code == KvCode::nuq ? nuq : affine;
  }
};

PanelProduct simd_product(Isa isa);  // portable, avx2, avx512
PanelProduct avx512_bf16_product();
PanelProduct amx_product();
bool amx_permitted();  // asks the kernel for tile data, once per process

const RowOps& row_ops(Isa isa);
const PartOps& affine_ops(Isa isa);
const PartOps& token_code_ops(Isa isa);
const PartOps& nuq_ops(Isa isa);
// AVX-512; false: not for these bits.
bool dequantize_by_table(const std::byte* source, int bits, int panels, int pairs, bf16* out, const std::byte* next);

}  // namespace vericache
