#include "compress/key_rounding.h"

#include <algorithm>

namespace vericache {
namespace {

constexpr int kEnoughRows = 2048;
constexpr int kMostRows = 512;  // of one pass

}  // namespace

size_t KeyRounding::bytes(const KvFormat& format, const KvShape& shape) {
  return format.ldlq() ? static_cast<size_t>(shape.layers) * rounding_bytes(shape) : 0;
}

KeyRounding::KeyRounding(const KvShape& shape, std::byte* memory)
    : shape_(shape), memory_(memory), rows_(static_cast<size_t>(shape.layers)) {}

void KeyRounding::learn(Kernels& kernels, int layer, int heads, const QueryRing& queries, int rows) {
  int& known = rows_[static_cast<size_t>(layer)];
  if (known >= kEnoughRows || rows == 0) {
    return;
  }
  const int taken = std::min(rows, kMostRows);
  kernels.fit_rounding({.shape = shape_,
                        .heads = heads,
                        .queries = queries,
                        .rows = taken,
                        .position = queries.origin + rows - taken,
                        .known = known,
                        .matrix = matrix(layer)});
  known += taken;
}

const bf16* KeyRounding::of(int layer) const {
  return rows_[static_cast<size_t>(layer)] > 0 ? matrix(layer) : nullptr;
}

bf16* KeyRounding::matrix(int layer) const {
  return reinterpret_cast<bf16*>(memory_ + static_cast<size_t>(layer) * rounding_bytes(shape_));
}

}  // namespace vericache
