#include "compress/compressor.h"

namespace vericache {

size_t Compressor::resident_bytes(int tokens, const KvShape& shape) const {
  const size_t pages = static_cast<size_t>((kept_tokens(tokens) + kPageTokens - 1) / kPageTokens);
  return pages * static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads) *
         head_page_bytes(format(), shape);
}

namespace {

// Bits of a value that a resident code of so many bits leaves open, headers and escapes included.
double open_bits(int resident_bits) {
  switch (resident_bits) {
    case 16:
      return 0;
    case 8:
      return 3.7;
    case 6:
      return 5.7;
    case 4:
      return 7.8;
    case 3:
      return 9.2;
    default:
      return 10.7;
  }
}

}  // namespace

double Compressor::coded_share() const {
  switch (residual_code()) {
    case ResidualCode::plain:
      return 0;
    case ResidualCode::lossless:
      return 11.45 / 16;
    case ResidualCode::resident:
      return (open_bits(format().key_bits) + open_bits(format().value_bits)) / 32;
  }
  return 1;
}

size_t Compressor::wire_bytes(int tokens, const KvShape& shape) const {
  const double plain =
      static_cast<double>(tokens / kPageTokens) * static_cast<double>(page_bytes(shape)) * shape.layers;
  return static_cast<size_t>(plain * coded_share());
}

}  // namespace vericache
