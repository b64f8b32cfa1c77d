// Any bytes as a safetensors file: an Error, or tensors that tile the data and can be read to their last byte.
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "model/checkpoint.h"

namespace {

using vericache::TensorDtype;
using vericache::TensorView;

void read_all(const TensorView& tensor) {
  uint64_t elements = 1;
  for (const int64_t extent : tensor.shape) {
    vericache::check(extent >= 0, "no dimension is negative");
    elements *= static_cast<uint64_t>(extent);
  }
  vericache::check(elements * vericache::dtype_bytes(tensor.dtype) == tensor.bytes.size(), "the shape fills the bytes");
  if (tensor.dtype != TensorDtype::bf16 && tensor.dtype != TensorDtype::f16 && tensor.dtype != TensorDtype::f32) {
    return;
  }
  const int64_t rows = tensor.shape.empty() ? 1 : tensor.shape[0];
  std::vector<float> wide(elements);
  std::vector<vericache::bf16> narrow(elements);
  vericache::read_rows(tensor, 0, rows, std::span<float>(wide));
  vericache::read_rows(tensor, 0, rows, std::span<vericache::bf16>(narrow));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto tensors = vericache::parse_safetensors(std::as_bytes(std::span(data, size)), "fuzz");
    size_t bytes = 0;
    for (const auto& [name, tensor] : tensors) {
      read_all(tensor);
      bytes += tensor.bytes.size();
    }
    vericache::check(bytes <= size, "tensors do not overlap");
  } catch (const vericache::Error&) {  // the one way to refuse
  }
  return 0;
}
