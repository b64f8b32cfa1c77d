// Products of few rows (few_rows.cu), for drafts: near the time that reading the weight takes, with bits of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/kernels.h"

namespace vericache::cuda {

// Whether the two below take the weight and so many rows; gate_up: padded_dim(out / 2) is out / 2.
bool few_rows_fit(const PackedMatrix& weight, int rows);
// y (rows, out) = x W^T, or y += x W^T; x (rows, in).
void few_rows_product(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue,
                      cudaStream_t stream);
// As Kernels::gate_product.
void few_rows_gate(const PackedMatrix& gate_up, const bf16* x, int rows, bf16* out, cudaStream_t stream);

}  // namespace vericache::cuda
