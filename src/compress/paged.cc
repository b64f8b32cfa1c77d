#include "compress/paged.h"

#include <fmt/format.h>

namespace vericache {

std::string PagedCompressor::name() const {
  if (format_.exact()) {
    return "none";
  }
  switch (format_.code) {
    case KvCode::fp8:
      return "fp8";
    case KvCode::int8:
      return "int8";
    default:
      break;
  }
  const std::string_view method = format_.code == KvCode::plane ? "plane"
                                  : format_.code == KvCode::nuq ? "kvquant"
                                  : format_.rotated             ? "quarot"
                                                                : "kivi";
  const std::string bits = format_.key_bits == format_.value_bits
                               ? fmt::format("{}:bits={}", method, format_.key_bits)
                               : fmt::format("{}:k={},v={}", method, format_.key_bits, format_.value_bits);
  return format_.code == KvCode::nuq ? fmt::format("{},outliers={}", bits, format_.outliers / 1000.0) : bits;
}

bool PagedCompressor::compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                               ResidentLayer& out) {
  const KvShape& shape = full.shape;
  for (int head = 0; head < shape.kv_heads; ++head) {
    if (!out.resize(head, fresh.end)) {
      return false;
    }
  }
  out.publish(kernels);
  kernels.quantize({.shape = shape,
                    .full = full.kv,
                    .first = fresh.begin / kPageTokens,
                    .count = (fresh.end - fresh.begin) / kPageTokens,
                    .out = out.view(),
                    .rounding = seen.rounding});
  return true;
}

}  // namespace vericache
