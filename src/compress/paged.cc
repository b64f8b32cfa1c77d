#include "compress/paged.h"

#include <fmt/format.h>

namespace vericache {

std::string PagedCompressor::name() const {
  if (format_.exact()) {
    return "none";
  }
  return format_.key_bits == format_.value_bits ? fmt::format("kivi:bits={}", format_.key_bits)
                                                : fmt::format("kivi:k={},v={}", format_.key_bits, format_.value_bits);
}

bool PagedCompressor::compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& /*seen*/,
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
                    .out = out.view()});
  return true;
}

}  // namespace vericache
