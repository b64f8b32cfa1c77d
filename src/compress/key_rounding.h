// KeyRounding: what rotated keys of a few bits are rounded by (RoundingArgs in kernels.h), of every layer; one for all
// sequences, since what queries ask of keys is the model's more than the text's (docs/compressors.md). It looks at the
// queries of full passes until it has seen enough of them.
// Called from the engine's thread, layer by layer, before compressors see what the pass has computed.
#pragma once

#include <cstddef>
#include <vector>

#include "backend/kernels.h"

namespace vericache {

class KeyRounding {
 public:
  // Of device memory; 0: keys of that format are rounded to the nearest code.
  static size_t bytes(const KvFormat& format, const KvShape& shape);

  KeyRounding(const KvShape& shape, std::byte* memory);

  // The rows of a ring, from its origin on. Enqueued on the lane.
  void learn(Kernels& kernels, int layer, int heads, const QueryRing& queries, int rows);
  // RoundingArgs::matrix; null before anything was learned.
  const bf16* of(int layer) const;

 private:
  bf16* matrix(int layer) const;

  KvShape shape_;
  std::byte* memory_;
  std::vector<int> rows_;  // that each layer was fitted to
};

}  // namespace vericache
