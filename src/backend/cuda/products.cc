#include "backend/cuda/products.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/check.h"

namespace vericache::cuda {

void Products::tune(std::span<const PackedMatrix> weights, ProductLane& lane) {
  for (const PackedMatrix& weight : weights) {
    const ProductShape shape = product_shape(weight);
    const bool known = std::any_of(plans_.begin(), plans_.end(), [&](const auto& plan) {
      return plan.shape.out == shape.out && plan.shape.in == shape.in;
    });
    if (!known) {
      plans_.push_back(tune_product(shape, max_rows_, free_choice_, lane));
    }
  }
}

size_t Products::scratch_bytes() const {
  size_t bytes = 0;
  for (const ProductPlan& plan : plans_) {
    bytes = std::max(bytes, product_scratch_bytes(plan.shape, plan.buckets.back().rows));
  }
  return bytes;
}

const ProductPlan& Products::plan(const PackedMatrix& weight) const {
  const int in = padded_dim(weight.in);
  const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const ProductPlan& plan) {
    return plan.shape.out == weight.out && plan.shape.in == in;
  });
  check(found != plans_.end(), "every weight's shape is tuned before it is multiplied");
  return *found;
}

// A row count between two buckets takes the algorithm of the larger one; where cuBLASLt refuses, another bucket's: all
// of them give the same bits.
const ProductBucket& Products::bucket_for(const ProductLane& lane, const ProductPlan& plan, int rows) const {
  int8_t& answer = plan.bucket_of_rows[static_cast<size_t>(rows)];
  if (answer < 0) {
    const auto larger = std::find_if(plan.buckets.begin(), plan.buckets.end(),
                                     [&](const ProductBucket& bucket) { return bucket.rows >= rows; });
    const auto fits = [&](const ProductBucket& bucket) { return product_fits(lane, plan.shape, bucket.choice, rows); };
    auto found = std::find_if(larger, plan.buckets.end(), fits);
    if (found == plan.buckets.end()) {
      found = std::find_if(plan.buckets.begin(), larger, fits);
      check(found != larger, "some algorithm of a product's plan takes every row count");
    }
    answer = static_cast<int8_t>(found - plan.buckets.begin());
  }
  return plan.buckets[static_cast<size_t>(answer)];
}

void Products::multiply(const ProductLane& lane, const PackedMatrix& weight, const bf16* x, int rows, float* y,
                        Epilogue epilogue) const {
  const ProductPlan& plan = this->plan(weight);
  // In even parts; each but the last a multiple of 64 rows, so that y begins on a boundary of 256 bytes.
  constexpr int kStep = 64;
  const int most = plan.buckets.back().rows;
  const int parts = (rows + most - 1) / most;
  const int part = parts <= 1 ? rows : std::min(most, ((rows + parts - 1) / parts + kStep - 1) / kStep * kStep);
  for (int first = 0; first < rows; first += part) {
    const int count = std::min(part, rows - first);
    run_product(lane, plan.shape, bucket_for(lane, plan, count).choice, weight.data,
                x + static_cast<ptrdiff_t>(first) * plan.shape.in, count,
                y + static_cast<ptrdiff_t>(first) * plan.shape.out, epilogue);
  }
}

std::string Products::report() const {
  std::string text;
  for (const ProductPlan& plan : plans_) {
    text += fmt::format("{} x {}{}: {} of {} algorithms in the class; rows:us", plan.shape.out, plan.shape.in,
                        plan.shape.slices > 1 ? fmt::format(" in {} slices", plan.shape.slices) : "", plan.admitted,
                        plan.offered);
    for (const ProductBucket& bucket : plan.buckets) {
      const char* form = bucket.choice.form == ProductForm::slices_at_once   ? "*"
                         : bucket.choice.form == ProductForm::slices_in_turn ? "+"
                                                                             : "";
      text += fmt::format(" {}:{:.1f}{}", bucket.rows, bucket.microseconds, form);
    }
    text += '\n';
  }
  return text;
}

}  // namespace vericache::cuda
