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

int DroppingCompressor::layer_pages(int tokens, int layer, const KvShape& shape) const {
  return shape.kv_heads * ((head_tokens(tokens, layer, shape.layers) + kPageTokens - 1) / kPageTokens);
}

void DroppingCompressor::count_heads(const FullLayer& full, int tokens, const Attended& /*seen*/,
                                     std::span<int> counts) const {
  std::fill(counts.begin(), counts.end(), head_tokens(tokens, full.layer, full.shape.layers));
}

bool DroppingCompressor::compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                                  ResidentLayer& out) {
  counts_.resize(static_cast<size_t>(full.shape.kv_heads));
  count_heads(full, fresh.end, seen, counts_);
  // What some heads give up is there for the others.
  for (const bool shrinks : {true, false}) {
    for (size_t i = 0; i < counts_.size(); ++i) {
      const int head = static_cast<int>(i);
      if ((counts_[i] < out.tokens(head)) == shrinks && !out.resize(head, counts_[i])) {
        return false;
      }
    }
  }
  const auto [least, most] = std::minmax_element(counts_.begin(), counts_.end());
  if (*most == 0) {
    return true;
  }
  check(*most <= out.chosen_stride(), "the chosen tokens of a head have room");
  out.publish(kernels);
  Choice choice{.tokens = fresh.end, .count = *most, .chosen = out.chosen(), .stride = out.chosen_stride()};
  if (*least != *most) {
    kernels.upload(scratch(), counts_.data(), counts_.size() * sizeof(int));
    choice.counts = reinterpret_cast<const int*>(scratch());
  }
  choose(kernels, full, seen, choice);
  kernels.gather({.shape = full.shape,
                  .full = full.kv,
                  .chosen = choice.chosen,
                  .stride = choice.stride,
                  .count = choice.count,
                  .counts = choice.counts,
                  .out = out.view(),
                  .rounding = seen.rounding});
  return true;
}

}  // namespace vericache
