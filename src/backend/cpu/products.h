// Products of the CPU backend: weights in panels of 16 outputs, and y = x W^T over them.
// Called from the thread that drives the engine; spreads over the pool.
#pragma once

#include <vector>

#include "backend/cpu/simd.h"
#include "base/threads.h"

namespace vericache {

class Products {
 public:
  Products(PanelProduct product, ThreadPool& pool);

  // As Kernels of the same names.
  size_t packed_bytes(int out, int in) const;
  void pack_rows(const bf16* source, int first, int rows, PackedMatrix& matrix) const;
  void fill_random(PackedMatrix& matrix, uint64_t seed, float scale) const;
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue);

  void unpack_row(const PackedMatrix& matrix, int row, float* out) const;  // out (in)

 private:
  void multiply_tile(const PackedMatrix& weight, const bf16* x, int rows, int first_panel, int panels, float* y,
                     bool add);
  void multiply_edge(const PackedMatrix& weight, const bf16* x, int rows, int k, int k_values, float* y,
                     bool accumulate);

  PanelProduct product_;
  ThreadPool& pool_;
  std::vector<std::vector<float>> edge_;  // per thread: (kRowBlock, 16), products of a panel that sticks out of y
};

}  // namespace vericache
