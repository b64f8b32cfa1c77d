// The matrix primitive where the processor has no bf16 instructions: pairs are widened by shift and mask, then two
// fused multiply-adds per pair, first value first.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/product_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstring>

#include "backend/cpu/simd.h"
#include "backend/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace vericache::HWY_NAMESPACE {
namespace {

constexpr int kVectors = 16 / static_cast<int>(hn::MaxLanes(F32()));  // per panel row

// Accumulators, one panel row of B (two vectors per vector of pairs) and the two values of A have to fit the registers:
// 32 of them in AVX-512, else 16.
constexpr int kBlockRows = kVectors == 1 ? 8 : (kVectors == 2 ? 4 : 1);
constexpr int kBlockPanels = kVectors == 1 ? 2 : 1;

template <int kRows, int kPanels>
HWY_INLINE void block(const bf16* a, size_t lda, const bf16* b, size_t panel_stride, int k_pairs, float* c, size_t ldc,
                      bool accumulate) {
  const F32 d;
  const U32 du;
  constexpr int kLanes = 16 / kVectors;
  constexpr int kColumns = kPanels * kVectors;
  Floats sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      sum[r][j] = accumulate ? hn::LoadU(d, c + static_cast<size_t>(r) * ldc + j * kLanes) : hn::Zero(d);
    }
  }
  for (int k = 0; k < k_pairs; ++k) {
    Floats first[kColumns];
    Floats second[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const bf16* row = b + static_cast<size_t>(j / kVectors) * panel_stride + (k * 16 + (j % kVectors) * kLanes) * 2;
      const Words pairs = hn::LoadU(du, reinterpret_cast<const uint32_t*>(row));
      first[j] = first_of_pair(pairs);
      second[j] = second_of_pair(pairs);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, a + static_cast<size_t>(r) * lda + 2 * k, sizeof(pair));
      const Words wide = hn::Set(du, pair);
      const Floats a0 = first_of_pair(wide);
      const Floats a1 = second_of_pair(wide);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        sum[r][j] = hn::MulAdd(a1, second[j], hn::MulAdd(a0, first[j], sum[r][j]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      hn::StoreU(sum[r][j], d, c + static_cast<size_t>(r) * ldc + j * kLanes);
    }
  }
}

template <int kPanels>
void rows_of_panels(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, float* c,
                    size_t ldc, bool accumulate) {
  int r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    block<kBlockRows, kPanels>(a + static_cast<size_t>(r) * lda, lda, b, panel_stride, k_pairs,
                               c + static_cast<size_t>(r) * ldc, ldc, accumulate);
  }
  for (; r < rows; ++r) {
    block<1, kPanels>(a + static_cast<size_t>(r) * lda, lda, b, panel_stride, k_pairs, c + static_cast<size_t>(r) * ldc,
                      ldc, accumulate);
  }
}

void panel_product(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, int panels,
                   float* c, size_t ldc, bool accumulate, const bf16* next) {
  prefetch_panels(next, panel_stride, k_pairs, panels);
  int p = 0;
  for (; p + kBlockPanels <= panels; p += kBlockPanels) {
    rows_of_panels<kBlockPanels>(a, lda, rows, b + static_cast<size_t>(p) * panel_stride, panel_stride, k_pairs,
                                 c + p * kPanel, ldc, accumulate);
  }
  for (; p < panels; ++p) {
    rows_of_panels<1>(a, lda, rows, b + static_cast<size_t>(p) * panel_stride, panel_stride, k_pairs, c + p * kPanel,
                      ldc, accumulate);
  }
}

}  // namespace

PanelProduct product() {
  return panel_product;
}

}  // namespace vericache::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vericache {

PanelProduct simd_product(Isa isa) {
  VERICACHE_FOR_ISA(isa, product);
}

}  // namespace vericache
#endif
