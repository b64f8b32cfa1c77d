#include "backend/cpu/products.h"

#include <algorithm>

#include "backend/random_fill.h"
#include "base/check.h"

namespace vericache {
namespace {

// Bytes of weights: fewer are multiplied before a second thread has joined (1-2 us).
constexpr size_t kForkWeightBytes = size_t{48} << 10;

// A block of rows stays in L2 while the panels of a task pass; a block of K keeps four panels in L1.
constexpr int kRowBlock = 192;
constexpr int kPanelBlock = 8;
constexpr int kThickRows = 24;
constexpr int kKBlock = 256;

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
size_t at(int rows, int columns) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns);
}
size_t panel_values(int in) {
  return at(padded_dim(in), kPanel);
}

}  // namespace

Products::Products(PanelProduct product, ThreadPool& pool)
    : product_(product),
      pool_(pool),
      edge_(static_cast<size_t>(pool.threads()), std::vector<float>(at(kRowBlock, kPanel))) {}

size_t Products::packed_bytes(int out, int in) const {
  return static_cast<size_t>(ceil_div(out, kPanel)) * panel_values(in) * sizeof(bf16);
}

void Products::pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const {
  check(first >= 0 && rows >= 0 && rows <= matrix.out - first, "packed rows lie in the matrix");
  const int pairs = padded_dim(matrix.in) / 2;
  for (int begin = first; begin < first + rows;) {
    const int panel = begin / kPanel;
    const int end = std::min(first + rows, (panel + 1) * kPanel);
    bf16* out = matrix.data + static_cast<size_t>(panel) * panel_values(matrix.in);
    for (int p = 0; p < pairs; ++p) {
      for (int row = begin; row < end; ++row) {
        for (int i = 2 * p; i < std::min(2 * p + 2, matrix.in); ++i) {
          out[at(p * kPanel + row % kPanel, 2) + static_cast<size_t>(i % 2)] =
              source[at(row - first, matrix.in) + static_cast<size_t>(i)];
        }
      }
    }
    begin = end;
  }
}

void Products::fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const {
  pool_.parallel_for(ceil_div(matrix.out, kPanel), [&](int panel) {
    bf16* out = matrix.data + static_cast<size_t>(panel) * panel_values(matrix.in);
    const int end = std::min(matrix.out, (panel + 1) * kPanel);
    for (int row = panel * kPanel; row < end; ++row) {
      for (int i = 0; i < matrix.in; ++i) {
        out[at(i / 2 * kPanel + row % kPanel, 2) + static_cast<size_t>(i % 2)] = random_value(seed, row, i, scale);
      }
    }
  });
}

void Products::unpack_row(const PackedMatrix& matrix, int row, float* out) const {
  const bf16* values = matrix.data + static_cast<size_t>(row / kPanel) * panel_values(matrix.in) + at(row % kPanel, 2);
  for (int i = 0; i < matrix.in; ++i) {
    out[i] = to_float(values[at(i / 2, 2 * kPanel) + static_cast<size_t>(i % 2)]);
  }
}

void Products::matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) {
  const bool add = epilogue == Epilogue::add;
  const int panels = ceil_div(weight.out, kPanel);
  const int row_block = std::min(rows, kRowBlock);
  const FlushDenormals flush;
  const auto tile = [&](int first_row, int first_panel, int tile_panels) {
    multiply_tile(weight, x + at(first_row, padded_dim(weight.in)), std::min(row_block, rows - first_row), first_panel,
                  std::min(tile_panels, panels - first_panel), y + at(first_row, weight.out), add);
  };
  if (rows <= 0) {
    return;
  }
  if (pool_.threads() == 1 ||
      packed_bytes(weight.out, weight.in) * static_cast<size_t>(ceil_div(rows, 6)) < kForkWeightBytes) {
    for (int row = 0; row < rows; row += row_block) {
      tile(row, 0, panels);
    }
    return;
  }
  // Few rows: long runs of panels, so that each thread streams its share of the weights. Many rows: tiles of y.
  const int groups = ceil_div(panels, kPanelBlock);
  const int tile_panels = rows > kThickRows ? kPanelBlock : std::max(1, groups / (4 * pool_.threads())) * kPanelBlock;
  const int columns = ceil_div(panels, tile_panels);
  pool_.parallel_for(columns * ceil_div(rows, row_block),
                     [&](int i) { tile(i / columns * row_block, i % columns * tile_panels, tile_panels); });
}

void Products::multiply_tile(const PackedMatrix& weight, const bf16* x, int rows, int first_panel, int panels, float* y,
                             bool add) {
  const int k = padded_dim(weight.in);
  const int k_block = rows > kThickRows ? kKBlock : k;
  const int full = std::min(panels, weight.out / kPanel - first_panel);
  for (int begin = 0; begin < k; begin += k_block) {
    const int values = std::min(k_block, k - begin);
    const bf16* panel = weight.data + static_cast<size_t>(first_panel) * panel_values(weight.in) + at(begin, kPanel);
    product_(x + begin, static_cast<size_t>(k), rows, panel, panel_values(weight.in), values / 2, full,
             y + first_panel * kPanel, static_cast<size_t>(weight.out), add || begin > 0, nullptr);
    if (full < panels) {
      multiply_edge(weight, x, rows, begin, values, y, add || begin > 0);
    }
  }
}

void Products::multiply_edge(const PackedMatrix& weight, const bf16* x, int rows, int k, int k_values, float* y,
                             bool accumulate) {
  float* edge = edge_[static_cast<size_t>(ThreadPool::thread_index())].data();
  const int panel = weight.out / kPanel;
  const int width = weight.out % kPanel;
  float* columns = y + panel * kPanel;
  for (int row = 0; accumulate && row < rows; ++row) {
    std::copy_n(columns + at(row, weight.out), width, edge + at(row, kPanel));
  }
  product_(x + k, static_cast<size_t>(padded_dim(weight.in)), rows,
           weight.data + static_cast<size_t>(panel) * panel_values(weight.in) + at(k, kPanel), panel_values(weight.in),
           k_values / 2, 1, edge, kPanel, accumulate, nullptr);
  for (int row = 0; row < rows; ++row) {
    std::copy_n(edge + at(row, kPanel), width, columns + at(row, weight.out));
  }
}

}  // namespace vericache
