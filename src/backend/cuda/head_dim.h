// HeadDim: a kernel's instance for each head dim that there is.
// Pure; host code.
#pragma once

#include "base/check.h"

namespace vericache::cuda {

// run(a value whose type tells the head dim)
template <int kHeadDim>
struct HeadDim {
  static constexpr int kValue = kHeadDim;
};
template <typename Run>
void for_head_dim(int head_dim, const Run& run) {
  switch (head_dim) {
    case 32:
      return run(HeadDim<32>());
    case 64:
      return run(HeadDim<64>());
    case 96:
      return run(HeadDim<96>());
    case 128:
      return run(HeadDim<128>());
    default:
      check(false, "kernels of head pages are there for head dims 32, 64, 96 and 128");
  }
}

}  // namespace vericache::cuda
