#include "backend/cuda/product_call.h"

#include <fmt/format.h>

#include <algorithm>

#include "backend/cuda/ops.h"
#include "base/check.h"

namespace vericache::cuda {
namespace {

// cuBLASLt counts in columns: row-major y = x W^T is the column-major product of W, transposed, with x.
struct Problem {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, x, y;
};

// `slices` neighbouring slices of K, each `depth` deep, one result each.
Problem make_problem(const ProductShape& shape, int depth, int slices, int rows) {
  Problem p;
  check_cublas(cublasLtMatmulDescInit(&p.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product");
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check_cublas(
      cublasLtMatmulDescSetAttribute(&p.operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
      "describing a product");
  const auto layout = [&](cublasLtMatrixLayoutOpaque_t* matrix, cudaDataType_t type, int height, int width, int pitch,
                          int64_t stride) {
    check_cublas(
        cublasLtMatrixLayoutInit(matrix, type, static_cast<uint64_t>(height), static_cast<uint64_t>(width), pitch),
        "describing a matrix");
    if (slices > 1) {
      const int32_t count = slices;
      check_cublas(cublasLtMatrixLayoutSetAttribute(matrix, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
                   "describing a matrix");
      check_cublas(cublasLtMatrixLayoutSetAttribute(matrix, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                                    sizeof(stride)),
                   "describing a matrix");
    }
  };
  layout(&p.weight, CUDA_R_16BF, depth, shape.out, shape.in, depth);
  layout(&p.x, CUDA_R_16BF, depth, rows, shape.in, depth);
  layout(&p.y, CUDA_R_32F, shape.out, rows, shape.out, static_cast<int64_t>(shape.out) * rows);
  return p;
}

Problem make_problem(const ProductShape& shape, ProductForm form, int rows) {
  const int depth = form == ProductForm::whole ? shape.in : shape.in / shape.slices;
  return make_problem(shape, depth, form == ProductForm::slices_at_once ? shape.slices : 1, rows);
}

}  // namespace

void check_cublas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]] {
    check(false, fmt::format("{}: {}", what, cublasLtGetStatusString(status)));
  }
}

ProductShape product_shape(const PackedMatrix& weight) {
  constexpr int kSlices = 4;
  constexpr int kDeep = 8192;
  constexpr int kSliceMultiple = 128;  // slices begin on boundaries of 256 bytes, as whole matrices do
  const int in = padded_dim(weight.in);
  const bool deep = in >= kDeep && in >= 2 * weight.out;
  const bool even = in % (kSlices * kSliceMultiple) == 0 && weight.out % 64 == 0;
  return {weight.out, in, deep && even ? kSlices : 1};
}

bool same_choice(const ProductChoice& a, const ProductChoice& b) {
  return a.form == b.form &&
         std::equal(std::begin(a.algorithm.data), std::end(a.algorithm.data), std::begin(b.algorithm.data));
}

ProductLane::ProductLane(cudaStream_t stream)
    : stream_(stream), workspace_(kProductWorkspaceBytes, "the workspace of matrix products") {
  check_cublas(cublasLtCreate(&handle_), "opening cuBLASLt");
}

ProductLane::~ProductLane() {
  check_cublas(cublasLtDestroy(handle_), "closing cuBLASLt");
}

void ProductLane::grow_scratch(size_t bytes) {
  if (bytes > scratch_.bytes()) {
    scratch_ = DeviceMemory(bytes, "the slices of matrix products");
  }
}

size_t product_scratch_bytes(const ProductShape& shape, int max_rows) {
  return shape.slices == 1 ? 0
                           : static_cast<size_t>(shape.slices) * static_cast<size_t>(shape.out) *
                                 static_cast<size_t>(std::min(max_rows, kMostRowsAtOnce)) * sizeof(float);
}

bool product_fits(const ProductLane& lane, const ProductShape& shape, const ProductChoice& choice, int rows) {
  if (choice.form == ProductForm::slices_at_once && product_scratch_bytes(shape, rows) > lane.scratch_bytes()) {
    return false;
  }
  if (choice.form == ProductForm::slices_at_once && rows > kMostRowsAtOnce) {
    return false;
  }
  Problem p = make_problem(shape, choice.form, rows);
  cublasLtMatmulHeuristicResult_t result{};
  return cublasLtMatmulAlgoCheck(lane.handle(), &p.operation, &p.weight, &p.x, &p.y, &p.y, &choice.algorithm,
                                 &result) == CUBLAS_STATUS_SUCCESS &&
         result.workspaceSize <= kProductWorkspaceBytes;
}

std::vector<ProductChoice> offered_products(const ProductLane& lane, const ProductShape& shape, ProductForm form,
                                            int rows, int most, bool split_k) {
  Problem p = make_problem(shape, form, rows);
  cublasLtMatmulPreferenceOpaque_t preference;
  check_cublas(cublasLtMatmulPreferenceInit(&preference), "asking for algorithms");
  const uint64_t workspace = kProductWorkspaceBytes;
  check_cublas(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                    sizeof(workspace)),
               "asking for algorithms");
  const uint32_t schemes = split_k ? CUBLASLT_REDUCTION_SCHEME_MASK : CUBLASLT_REDUCTION_SCHEME_NONE;
  check_cublas(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                                    sizeof(schemes)),
               "asking for algorithms");
  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(most));
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lane.handle(), &p.operation, &p.weight, &p.x, &p.y, &p.y,
                                                               &preference, most, results.data(), &found);
  std::vector<ProductChoice> choices;
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) {
    return choices;
  }
  check_cublas(status, "asking for algorithms");
  for (int i = 0; i < found; ++i) {
    const cublasLtMatmulHeuristicResult_t& result = results[static_cast<size_t>(i)];
    if (result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kProductWorkspaceBytes) {
      choices.push_back({form, result.algo});
    }
  }
  return choices;
}

cublasStatus_t try_product(const ProductLane& lane, const ProductShape& shape, const ProductChoice& choice,
                           const bf16* weight, const bf16* x, int rows, float* y, Epilogue epilogue) {
  Problem p = make_problem(shape, choice.form, rows);
  const auto call = [&](ptrdiff_t first_k, float* target, bool add) {
    const float one = 1;
    const float beta = add ? 1.0f : 0.0f;
    return cublasLtMatmul(lane.handle(), &p.operation, &one, weight + first_k, &p.weight, x + first_k, &p.x, &beta,
                          target, &p.y, target, &p.y, &choice.algorithm, lane.workspace(), kProductWorkspaceBytes,
                          lane.stream());
  };
  const bool add = epilogue == Epilogue::add;
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  switch (choice.form) {
    case ProductForm::whole:
      return call(0, y, add);
    case ProductForm::slices_at_once:
      check(product_scratch_bytes(shape, rows) <= lane.scratch_bytes(), "a product's slices fit their scratch");
      status = call(0, lane.scratch(), false);
      add_slices(lane.scratch(), shape.slices, static_cast<size_t>(rows) * static_cast<size_t>(shape.out), y, add,
                 lane.stream());
      return status;
    case ProductForm::slices_in_turn:
      for (int slice = 0; slice < shape.slices && status == CUBLAS_STATUS_SUCCESS; ++slice) {
        status = call(static_cast<ptrdiff_t>(slice) * (shape.in / shape.slices), y, add || slice > 0);
      }
      return status;
  }
  return status;
}

void run_product(const ProductLane& lane, const ProductShape& shape, const ProductChoice& choice, const bf16* weight,
                 const bf16* x, int rows, float* y, Epilogue epilogue) {
  check_cublas(try_product(lane, shape, choice, weight, x, rows, y, epilogue), "a matrix product");
}

}  // namespace vericache::cuda
