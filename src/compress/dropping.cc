#include "compress/dropping.h"

#include <algorithm>
#include <cmath>

#include "compress/paged.h"

namespace vericache {

int Budget::tokens_of(int tokens) const {
  const int wanted = amount <= 1 ? static_cast<int>(std::ceil(amount * tokens)) : static_cast<int>(amount);
  return std::min(tokens, std::max(wanted, least));
}

std::string DroppingCompressor::format_suffix() const {
  return format_.exact() ? "" : "+" + PagedCompressor(format_).name();
}

bool DroppingCompressor::compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                                  ResidentLayer& out) {
  const int count = kept_tokens(fresh.end);
  for (int head = 0; head < full.shape.kv_heads; ++head) {
    if (!out.resize(head, count)) {
      return false;
    }
  }
  if (count == 0) {
    return true;
  }
  check(count <= out.chosen_stride(), "the chosen tokens of a head have room");
  out.publish(kernels);
  choose(kernels, full, fresh.end, seen, out.chosen(), out.chosen_stride());
  kernels.gather({.shape = full.shape,
                  .full = full.kv,
                  .chosen = out.chosen(),
                  .stride = out.chosen_stride(),
                  .count = count,
                  .out = out.view()});
  return true;
}

}  // namespace vericache
