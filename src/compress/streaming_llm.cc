#include "compress/streaming_llm.h"

#include <fmt/format.h>

#include <cmath>

namespace vericache {

std::string StreamingLlm::name() const {
  return fmt::format("streaming-llm:sinks={},window={}{}", sinks_, window_, format_suffix());
}

int StreamingLlm::kept_tokens(int tokens) const {
  return Budget{window_, 0}.tokens_of(tokens) + sinks_ < tokens ? Budget{window_, 0}.tokens_of(tokens) + sinks_
                                                                : tokens;
}

void StreamingLlm::score(Kernels& /*kernels*/, const FullLayer& full, int tokens, const Attended& /*seen*/,
                         std::span<float> scores) {
  for (int head = 0; head < full.shape.kv_heads; ++head) {
    for (int token = 0; token < tokens; ++token) {
      scores[static_cast<size_t>(head) * static_cast<size_t>(tokens) + static_cast<size_t>(token)] =
          token < sinks_ ? INFINITY : static_cast<float>(token);
    }
  }
}

}  // namespace vericache
