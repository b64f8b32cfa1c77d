// One product y = x W^T as cuBLASLt runs it: the form, the algorithm, the call; and the kernels around it. x is
// (rows, in), W (out, in), y (rows, out), all row-major. Called from the engine's thread; enqueues, allocates nothing.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/cuda/device_memory.h"
#include "backend/kernels.h"

namespace vericache::cuda {

// Fails with cuBLASLt's own words.
void check_cublas(cublasStatus_t status, const char* what);

// A deep and narrow product leaves most of the GPU idle at few rows: too few tiles of y, each with a long sum. Its K is
// cut into slices, always the same ones, and their sums are added up in order: y + p0 + p1 + p2 + p3.
struct ProductShape {
  int out = 0;
  int in = 0;  // padded_dim
  int slices = 1;
  friend bool operator==(const ProductShape&, const ProductShape&) = default;
};
ProductShape product_shape(const PackedMatrix& weight);

// slices_at_once: all slices into scratch, then added up. slices_in_turn: each slice is added to y by its product.
enum class ProductForm { whole, slices_at_once, slices_in_turn };
inline constexpr int kMostRowsAtOnce = 256;  // of slices_at_once, which bounds its scratch

struct ProductChoice {
  ProductForm form = ProductForm::whole;
  cublasLtMatmulAlgo_t algorithm{};
};
bool same_choice(const ProductChoice& a, const ProductChoice& b);

inline constexpr size_t kProductWorkspaceBytes = size_t{8} << 20;

// What a lane multiplies with, its own: products of two lanes run at the same time.
class ProductLane {
 public:
  explicit ProductLane(cudaStream_t stream);
  ~ProductLane();
  ProductLane(const ProductLane&) = delete;
  ProductLane& operator=(const ProductLane&) = delete;

  // Scratch for slices_at_once, grown while models are loaded.
  void grow_scratch(size_t bytes);

  cudaStream_t stream() const { return stream_; }
  cublasLtHandle_t handle() const { return handle_; }
  void* workspace() const { return workspace_.as<void>(); }
  float* scratch() const { return scratch_.as<float>(); }
  size_t scratch_bytes() const { return scratch_.bytes(); }

  size_t device_bytes() const { return workspace_.bytes() + scratch_.bytes(); }

 private:
  cudaStream_t stream_;
  cublasLtHandle_t handle_ = nullptr;
  DeviceMemory workspace_;
  DeviceMemory scratch_;
};
size_t product_scratch_bytes(const ProductShape& shape, int max_rows);

// Whether cuBLASLt runs this choice at so many rows, within the workspace.
bool product_fits(const ProductLane& lane, const ProductShape& shape, const ProductChoice& choice, int rows);

// What cuBLASLt offers, its favourite first. split_k: algorithms that cut K as the rows suggest are welcome.
std::vector<ProductChoice> offered_products(const ProductLane& lane, const ProductShape& shape, ProductForm form,
                                            int rows, int most, bool split_k);

// What cuBLASLt answers; while algorithms are tried out, a refusal is an answer too.
cublasStatus_t try_product(const ProductLane& lane, const ProductShape& shape, const ProductChoice& choice,
                           const bf16* weight, const bf16* x, int rows, float* y, Epilogue epilogue);
void run_product(const ProductLane& lane, const ProductShape& shape, const ProductChoice& choice, const bf16* weight,
                 const bf16* x, int rows, float* y, Epilogue epilogue);

// product_kernels.cu
// y (count) = [y +] slices[0] + slices[1] + ..., each (count), in this order.
void add_slices(const float* slices, int slice_count, size_t count, float* y, bool add, cudaStream_t stream);
// Random values of many magnitudes, whose sums show the order of their terms. Row r holds what row (r + shift) % period
// holds without a shift.
void fill_proof_rows(bf16* values, int rows, int columns, int shift, int period, uint64_t seed, cudaStream_t stream);
void fill_proof_rows(float* values, int rows, int columns, int shift, int period, uint64_t seed, cudaStream_t stream);
// Of the bits of each row; never 0.
void hash_rows(const float* values, int rows, int columns, uint64_t* hashes, cudaStream_t stream);

}  // namespace vericache::cuda
