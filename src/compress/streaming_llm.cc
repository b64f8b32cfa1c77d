#include "compress/streaming_llm.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace vericache {

std::string StreamingLlm::name() const {
  return fmt::format("streaming-llm:sinks={},window={}{}", sinks_, window_, format_suffix());
}

int StreamingLlm::kept_tokens(int tokens) const {
  return std::min(tokens, Budget{window_, 0}.tokens_of(tokens) + sinks_);
}

// Which tokens stay follows from their number alone: every head keeps the same, and the host names them.
void StreamingLlm::choose(Kernels& kernels, const FullLayer& full, const Attended& /*seen*/, const Choice& choice) {
  const int sinks = std::min(sinks_, choice.count);
  kept_.resize(static_cast<size_t>(choice.count));
  std::iota(kept_.begin(), kept_.begin() + sinks, 0);
  std::iota(kept_.begin() + sinks, kept_.end(), choice.tokens - (choice.count - sinks));
  for (int head = 0; head < full.shape.kv_heads; ++head) {
    kernels.upload(reinterpret_cast<std::byte*>(choice.chosen + static_cast<ptrdiff_t>(head) * choice.stride),
                   kept_.data(), kept_.size() * sizeof(int));
  }
}

}  // namespace vericache
