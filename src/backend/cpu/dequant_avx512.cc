// Dequantization by table: with 4 or 2 bits a pair of values has at most 16 of each, so one register holds both values'
// bf16 results and a permutation looks 32 of them up at once. The tables come from the same fused formula as
// quant_ops.cc: equal bits.
// GCC 12 takes the intrinsics' deliberately undefined operands for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include <cstring>

#include "backend/cpu/simd.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")

namespace vericache {
namespace {

// bf16 of minimum + code * scale for the codes 0..15, as 16 words.
inline __m256i table_of(bf16 scale, bf16 minimum) {
  const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 x = _mm512_fmadd_ps(codes, _mm512_set1_ps(to_float(scale)), _mm512_set1_ps(to_float(minimum)));
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// Words 0-15: results of the pair's first value, 16-31: of its second.
inline __m512i pair_table(const std::byte* scales, int pair) {
  bf16 affine[4];
  std::memcpy(affine, scales + static_cast<size_t>(pair) * sizeof(affine), sizeof(affine));
  return _mm512_inserti64x4(_mm512_castsi256_si512(table_of(affine[0], affine[1])), table_of(affine[2], affine[3]), 1);
}

// One byte a lane, the pair's codes in its low and high half of 2 * bits, becomes a word index per value.
template <int kBits>
inline __m512i indices(__m512i bytes) {
  const __m512i mask = _mm512_set1_epi32(((1 << kBits) - 1) * 0x10001);
  const __m512i second = _mm512_set1_epi32(0x100000);
  const __m512i spread = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 16 - kBits));
  return _mm512_or_si512(_mm512_and_si512(spread, mask), second);
}

inline __m512i load_bytes(const std::byte* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

void dequantize_4(const std::byte* source, int panels, int pairs, bf16* out, const std::byte* next) {
  const std::byte* scales = source + static_cast<size_t>(panels * pairs) * kPanel;
  for (int pair = 0; pair < pairs; ++pair) {
    prefetch_pair(next, 4, panels, pairs, pair);
    const __m512i table = pair_table(scales, pair);
    for (int panel = 0; panel < panels; ++panel) {
      const size_t row = static_cast<size_t>(panel * pairs + pair);
      const __m512i index = indices<4>(load_bytes(source + row * kPanel));
      _mm512_storeu_si512(out + row * 2 * kPanel, _mm512_permutexvar_epi16(index, table));
    }
  }
}

void dequantize_2(const std::byte* source, int panels, int pairs, bf16* out, const std::byte* next) {
  const std::byte* scales = source + static_cast<size_t>(panels * pairs) * kPanel / 2;
  for (int pair = 0; pair < pairs; pair += 2) {
    prefetch_pair(next, 2, panels, pairs, pair);
    const __m512i table = pair_table(scales, pair);
    const __m512i next_table = pair_table(scales, pair + 1);
    for (int panel = 0; panel < panels; ++panel) {
      const size_t row = static_cast<size_t>(panel * pairs + pair);
      const __m512i bytes = load_bytes(source + row / 2 * kPanel);
      _mm512_storeu_si512(out + row * 2 * kPanel, _mm512_permutexvar_epi16(indices<2>(bytes), table));
      const __m512i next_index = indices<2>(_mm512_srli_epi32(bytes, 4));
      _mm512_storeu_si512(out + (row + 1) * 2 * kPanel, _mm512_permutexvar_epi16(next_index, next_table));
    }
  }
}

}  // namespace

bool dequantize_by_table(const std::byte* source, int bits, int panels, int pairs, bf16* out, const std::byte* next) {
  if (bits == 4) {
    dequantize_4(source, panels, pairs, out, next);
  } else if (bits == 2) {
    dequantize_2(source, panels, pairs, out, next);
  }
  return bits == 4 || bits == 2;
}

}  // namespace vericache

#pragma GCC pop_options
