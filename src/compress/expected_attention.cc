#include "compress/expected_attention.h"

#include <fmt/format.h>

namespace vericache {

std::string ExpectedAttention::name() const {
  return fmt::format("expected:budget={},window={},future={},sinks={}{}", options_.budget.amount, options_.window,
                     options_.future, options_.sinks, format_suffix());
}

void ExpectedAttention::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen,
                              float* scores) {
  const Attended voters = seen.last(options_.window);
  kernels.expected_attention({.shape = full.shape,
                              .heads = voters.heads,
                              .scale = voters.scale,
                              .queries = voters.queries,
                              .rows = voters.rows,
                              .position = voters.position,
                              .rope = voters.rope,
                              .from = voters.position + voters.rows,
                              .future = options_.future,
                              .kv = full.kv,
                              .tokens = tokens,
                              .sinks = options_.sinks,
                              .scratch = own_scratch(tokens, full.shape),
                              .scores = scores});
}

}  // namespace vericache
