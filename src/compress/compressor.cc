#include "compress/compressor.h"

namespace vericache {

size_t Compressor::resident_bytes(int tokens, const KvShape& shape) const {
  const size_t pages = static_cast<size_t>((kept_tokens(tokens) + kPageTokens - 1) / kPageTokens);
  return pages * static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads) *
         head_page_bytes(format(), shape);
}

namespace {

// Bits of a value that a resident code leaves open, headers and escapes included.
double open_bits(const KvPart& part) {
  if (part.exact()) {
    return 0;
  }
  switch (part.code) {
    case KvCode::plane:
      return 12.12 - part.bits;
    case KvCode::fp8:
      return 4.7;
    case KvCode::int8:
      return 4.4;
    case KvCode::affine:
      break;
  }
  switch (part.bits) {
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
      return (open_bits(format().key()) + open_bits(format().value())) / 32;
  }
  return 1;
}

size_t Compressor::wire_bytes(int tokens, const KvShape& shape) const {
  const double plain =
      static_cast<double>(tokens / kPageTokens) * static_cast<double>(page_bytes(shape)) * shape.layers;
  return static_cast<size_t>(plain * coded_share());
}

}  // namespace vericache
