// Products: y = x W^T for every weight shape of a model and every row count. What runs at which row count is chosen
// once, among algorithms that have proved to give a row the same bits. tune() belongs to the thread that loads,
// multiply() to the engine's; read-only after tune() but for a memory of answers that cuBLASLt gave.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda/product_call.h"

namespace vericache::cuda {

// What a shape runs at up to `rows` rows.
struct ProductBucket {
  int rows = 0;
  ProductChoice choice;
  double microseconds = 0;  // as measured when it was chosen; for reports alone
};

struct ProductPlan {
  ProductShape shape;
  std::vector<ProductBucket> buckets;          // ascending; more rows than the last has go in several calls
  int offered = 0;                             // algorithms that were tried, over all buckets
  int admitted = 0;                            // of them, in the plan's bit class
  mutable std::vector<int8_t> bucket_of_rows;  // (rows of the last bucket + 1): -1 = not asked yet
};

class Products {
 public:
  // free_choice: the fastest algorithm at each row count, split-K included; rows do not keep their bits. It is for
  // measuring what exactness costs.
  explicit Products(int max_rows, bool free_choice = false) : max_rows_(max_rows), free_choice_(free_choice) {}

  // One weight of each shape; their values do not matter. Needs some device memory while it runs. Error if the memory
  // is lacking, or if a shape has no algorithm whose rows keep their bits.
  void tune(std::span<const PackedMatrix> weights, ProductLane& lane);
  // What the lanes have to offer, for all shapes so far.
  size_t scratch_bytes() const;

  // The weight's shape was tuned. x (rows, padded_dim(in)), y (rows, out).
  void multiply(const ProductLane& lane, const PackedMatrix& weight, const bf16* x, int rows, float* y,
                Epilogue epilogue) const;

  const ProductPlan& plan(const PackedMatrix& weight) const;
  std::string report() const;  // a line per shape

 private:
  const ProductBucket& bucket_for(const ProductLane& lane, const ProductPlan& plan, int rows) const;

  int max_rows_;
  bool free_choice_;
  std::vector<ProductPlan> plans_;
};

// product_tuning.cc
ProductPlan tune_product(const ProductShape& shape, int max_rows, bool free_choice, ProductLane& lane);

}  // namespace vericache::cuda
