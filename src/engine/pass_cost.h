// PassCost: what passes of this engine have cost lately, so that the horizon can be weighed.
// Numbers in, numbers out; the engine's thread.
#pragma once

#include <algorithm>

namespace vericache {

// seconds = base + per_row * rows, a least-squares line through the passes seen, older ones weighing less.
class PassCost {
 public:
  void add(double rows, double seconds) {
    constexpr double kDecay = 0.95;
    for (double* sum : {&n_, &x_, &y_, &xx_, &xy_}) {
      *sum *= kDecay;
    }
    n_ += 1;
    x_ += rows;
    y_ += seconds;
    xx_ += rows * rows;
    xy_ += rows * seconds;
  }
  // Rows that hardly differ say nothing of the slope, and noise must not make the pass itself look free: base is at
  // least a quarter of the mean.
  double per_row() const {
    const double spread = n_ * xx_ - x_ * x_;
    if (spread <= 1e-3 * n_ * xx_) {
      return 0;
    }
    return std::clamp((n_ * xy_ - x_ * y_) / spread, 0.0, 0.75 * y_ / x_);
  }
  double base() const { return n_ > 0 ? (y_ - per_row() * x_) / n_ : 0; }

 private:
  double n_ = 0, x_ = 0, y_ = 0, xx_ = 0, xy_ = 0;
};

}  // namespace vericache
