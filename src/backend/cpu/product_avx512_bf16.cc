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
                  bool accumulate) {
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
        _mm_prefetch(reinterpret_cast<const char*>(row + kPrefetchLines * 32), _MM_HINT_T0);
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

template <int kPanels>
void rows_of_panels(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, float* c,
                    size_t ldc, bool accumulate) {
  if (rows == 1) {
    return block<1, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
  }
  if (rows == 2) {
    return block<2, kPanels, true>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
  }
  if constexpr (kPanels <= kBlockPanels) {
    for (; rows >= kBlockRows; rows -= kBlockRows, a += kBlockRows * lda, c += kBlockRows * ldc) {
      block<kBlockRows, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
    }
    switch (rows) {
      case 5:
        return block<5, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
      case 4:
        return block<4, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
      case 3:
        return block<3, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
      case 2:
        return block<2, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
      case 1:
        return block<1, kPanels, false>(a, lda, b, panel_stride, k_pairs, c, ldc, accumulate);
      default:
        return;
    }
  }
}

void panel_product(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, int panels,
                   float* c, size_t ldc, bool accumulate) {
  for (; rows <= kThinRows && panels >= kThinPanels;
       panels -= kThinPanels, b += kThinPanels * panel_stride, c += kThinPanels * kPanel) {
    rows_of_panels<kThinPanels>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate);
  }
  for (; panels >= kBlockPanels; panels -= kBlockPanels, b += kBlockPanels * panel_stride, c += kBlockPanels * kPanel) {
    rows_of_panels<kBlockPanels>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate);
  }
  if (panels >= 2) {
    rows_of_panels<2>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate);
    panels -= 2;
    b += 2 * panel_stride;
    c += 2 * kPanel;
  }
  if (panels == 1) {
    rows_of_panels<1>(a, lda, rows, b, panel_stride, k_pairs, c, ldc, accumulate);
  }
}

}  // namespace

PanelProduct avx512_bf16_product() {
  return panel_product;
}

}  // namespace vericache

#pragma GCC pop_options
