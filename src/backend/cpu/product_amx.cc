// The matrix primitive with AMX tiles: C tiles of 16 rows x 16 floats, A tiles of 16 rows x 32 bf16, B tiles of 16
// panel rows.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "backend/cpu/simd.h"

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

namespace vericache {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a tile row
constexpr int kTilePairs = 16;  // of K in one tile product

// The 64 bytes that ldtilecfg reads (Intel SDM, palette 1).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles: C 0-3, A 4-5, B 6-7. `upper` rows in the tiles 0, 1 and 4, `lower` in 2, 3 and 5: tiles of fewer than 16 rows
// neither read nor write beyond the matrix, and a row's sum does not depend on how many rows its tile has.
void configure(int upper, int lower) {
  thread_local int configured = 0;
  const int wanted = upper * 32 + lower;
  if (configured == wanted) {
    return;
  }
  TileConfig config;
  const int rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kTileBytes;
    config.rows[t] = static_cast<uint8_t>(rows[t]);
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
  configured = wanted;
}

// GCC's tile intrinsics do not say that they read memory: the compiler must not hold back stores to A, B or C.
inline void memory_is_current() {
  __asm__ volatile("" ::: "memory");
}

struct Operands {
  const bf16* a;
  size_t lda;  // values
  const bf16* b;
  size_t panel_stride;
  int k_pairs;
  float* c;
  size_t ldc;  // floats
  bool accumulate;
};

// Rows: `upper` in the tiles 0, 1 and, if kBoth, 16 below them in 2, 3. Columns: one panel or two.
template <bool kBoth, int kPanels>
inline void block(const Operands& o) {
  const long a_bytes = static_cast<long>(o.lda * sizeof(bf16));
  const long c_bytes = static_cast<long>(o.ldc * sizeof(float));
  const bf16* a_lower = o.a + kTileRows * o.lda;
  float* c_lower = o.c + kTileRows * o.ldc;
  memory_is_current();
  if (o.accumulate) {
    _tile_loadd(0, o.c, c_bytes);
    if constexpr (kPanels == 2) _tile_loadd(1, o.c + kPanel, c_bytes);
    if constexpr (kBoth) _tile_loadd(2, c_lower, c_bytes);
    if constexpr (kBoth && kPanels == 2) _tile_loadd(3, c_lower + kPanel, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kPanels == 2) _tile_zero(1);
    if constexpr (kBoth) _tile_zero(2);
    if constexpr (kBoth && kPanels == 2) _tile_zero(3);
  }
  for (int k = 0; k < o.k_pairs; k += kTilePairs) {
    const bf16* b = o.b + static_cast<size_t>(k) * 32;
    _tile_loadd(6, b, kTileBytes);
    _tile_loadd(4, o.a + 2 * k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kPanels == 2) {
      _tile_loadd(7, b + o.panel_stride, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBoth) {
      _tile_loadd(5, a_lower + 2 * k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kPanels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, o.c, c_bytes);
  if constexpr (kPanels == 2) _tile_stored(1, o.c + kPanel, c_bytes);
  if constexpr (kBoth) _tile_stored(2, c_lower, c_bytes);
  if constexpr (kBoth && kPanels == 2) _tile_stored(3, c_lower + kPanel, c_bytes);
  memory_is_current();
}

template <bool kBoth>
void panels_of_rows(Operands o, int panels) {
  for (; panels >= 2; panels -= 2, o.b += 2 * o.panel_stride, o.c += 2 * kPanel) {
    block<kBoth, 2>(o);
  }
  if (panels == 1) {
    block<kBoth, 1>(o);
  }
}

void panel_product(const bf16* a, size_t lda, int rows, const bf16* b, size_t panel_stride, int k_pairs, int panels,
                   float* c, size_t ldc, bool accumulate, const bf16* next) {
  prefetch_panels(next, panel_stride, k_pairs, panels);
  while (rows > 0) {
    const Operands o{a, lda, b, panel_stride, k_pairs, c, ldc, accumulate};
    const int upper = rows < kTileRows ? rows : kTileRows;
    const int below = rows - upper < kTileRows ? rows - upper : kTileRows;
    if (below > 0) {
      configure(upper, below);
      panels_of_rows<true>(o, panels);
    } else {
      configure(upper, kTileRows);
      panels_of_rows<false>(o, panels);
    }
    rows -= upper + below;
    a += static_cast<size_t>(upper + below) * lda;
    c += static_cast<size_t>(upper + below) * ldc;
  }
}

}  // namespace

PanelProduct amx_product() {
  return panel_product;
}

bool amx_permitted() {
  static const bool permitted = [] {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }();
  return permitted;
}

}  // namespace vericache

#pragma GCC pop_options
