// The matrix primitive with AVX-512-BF16's dot product of pairs (Zen 4, Cooper Lake and later).
#include <immintrin.h>

#include <cstring>

#include "backend/cpu/simd.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace vericache {
namespace {

// 6 x 4 accumulators, 4 vectors of B and one of A: 29 of 32 registers, and 10 loads for 24 products.
constexpr int kBlockRows = 6;
constexpr int kBlockPanels = 4;
// One or two rows are bound by memory: more panels at once give more independent sums and more cache lines in flight.
constexpr int kThinRows = 2;
constexpr int kThinPanels = 8;
constexpr int kPrefetchLines = 16;

template <int kRows, int kPanels, bool kPrefetch>
inline void block(const bf16* a, size_t lda, const bf16* b, size_t panel_stride, int k_pairs, float* c, size_t ldc,
                  bool accumulate, const bf16* ahead) {
  __m512 sum[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      sum[r][p] = accumulate ? _mm512_loadu_ps(c + static_cast<size_t>(r) * ldc + p * kPanel) : _mm512_setzero_ps();
    }
  }
  for (int k = 0; k < k_pairs; ++k) {
    __m512bh line[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const bf16* row = b + static_cast<size_t>(p) * panel_stride + k * 32;
      line[p] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(row));
      if constexpr (kPrefetch) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + static_cast<size_t>(p) * panel_stride + k * 32),
                     _MM_HINT_T0);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, a + static_cast<size_t>(r) * lda + 2 * k, sizeof(pair));
      const __m512bh wide = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
        sum[r][p] = _mm512_dpbf16_ps(sum[r][p], wide, line[p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      _mm512_storeu_ps(c + static_cast<size_t>(r) * ldc + p * kPanel, sum[r][p]);
    }
  }
}

// The first block of rows fetches ahead; the blocks after it find B in the cache.
template <int kPanels>
void rows_of_panels(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, float* c,
                    size_t ldc, bool accumulate, const bf16* ahead) {
  constexpr int kBlock = kPanels > kBlockPanels ? kThinRows : kBlockRows;
  if (rows >= kBlock) {
    block<kBlock, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
    rows -= kBlock, a += kBlock * lda, c += kBlock * ldc;
  }
  for (; rows >= kBlock; rows -= kBlock, a += kBlock * lda, c += kBlock * ldc) {
    block<kBlock, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
  }
  if constexpr (kBlock > 2) {
    if (rows == 5) block<5, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
    if (rows == 4) block<4, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
    if (rows == 3) block<3, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
    if (rows == 2) block<2, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
  }
  if (rows == 1) block<1, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
}

void panel_product(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, int panels,
                   float* c, size_t ldc, bool accumulate, const bf16* next) {
  const bf16* ahead = next != nullptr ? next : b + kPrefetchLines * 32;
  const auto advance = [&](int done) {
    panels -= done;
    b += static_cast<size_t>(done) * panel_stride;
    ahead += static_cast<size_t>(done) * panel_stride;
    c += done * kPanel;
  };
  for (; rows <= kThinRows && panels >= kThinPanels; advance(kThinPanels)) {
    rows_of_panels<kThinPanels>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
  }
  for (; panels >= kBlockPanels; advance(kBlockPanels)) {
    rows_of_panels<kBlockPanels>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
  }
  if (panels >= 2) {
    rows_of_panels<2>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
    advance(2);
  }
  if (panels == 1) {
    rows_of_panels<1>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate, ahead);
  }
}

}  // namespace

PanelProduct avx512_bf16_product() {
  return panel_product;
}

}  // namespace vericache

#pragma GCC pop_options
