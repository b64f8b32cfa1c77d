#include "compress/compressor.h"

namespace vericache {

size_t Compressor::resident_bytes(int tokens, const KvShape& shape) const {
  const size_t pages = static_cast<size_t>((kept_tokens(tokens) + kPageTokens - 1) / kPageTokens);
  return pages * static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads) *
         head_page_bytes(format(), shape);
}

}  // namespace vericache
