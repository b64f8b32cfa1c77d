#include "compress/kvzip.h"

#include <fmt/format.h>

#include <algorithm>

namespace vericache {

std::string KvZip::name() const {
  return fmt::format("kvzip:budget={}{}", budget_.amount, format_suffix());
}

// The largest weight of each token so far: (kv_heads, max_tokens).
size_t KvZip::notes_bytes(int max_tokens, const KvShape& shape) const {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(max_tokens) * sizeof(float);
}

void KvZip::reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) {
  MassArgs args = mass_args(full, tokens, seen, reinterpret_cast<float*>(seen.notes.device), seen.notes.max_tokens);
  args.added = seen.notes.reconstructed;
  args.of = MassOf::largest;
  kernels.attention_mass(args);
}

void KvZip::score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) {
  const int weighed = std::min(seen.notes.reconstructed, tokens);
  const int later = tokens - weighed;
  const int recent = std::min(later, kept_tokens(tokens) / 2);
  auto* largest = reinterpret_cast<float*>(seen.notes.device);
  for (int head = 0; head < full.shape.kv_heads; ++head, largest += seen.notes.max_tokens) {
    if (later > 0) {
      kernels.zero(reinterpret_cast<std::byte*>(largest + weighed), static_cast<size_t>(later) * sizeof(float));
    }
    kernels.pool_mass(largest, 1, tokens, 0, recent, scores + static_cast<ptrdiff_t>(head) * tokens);
  }
}

}  // namespace vericache
