#include "compress/compressor.h"

#include <algorithm>

namespace vericache {

// A layer's share of a budget may fall while the context grows, and layers follow one after the other: what counts is
// the most of each on the way.
int Compressor::resident_pages(int tokens, const KvShape& shape) const {
  int pages = 0;
  for (int layer = 0; layer < shape.layers; ++layer) {
    int most = 0;
    for (int held = 0; held < tokens + kPageTokens; held += kPageTokens) {
      most = std::max(most, layer_pages(std::min(held, tokens), layer, shape));
    }
    pages += most;
  }
  return pages;
}

size_t Compressor::resident_bytes(int tokens, const KvShape& shape) const {
  return static_cast<size_t>(resident_pages(tokens, shape)) * head_page_bytes(format(), shape);
}

// Dropped tokens cross where the kept ones are exact, else all.
namespace {

// Bits of a value that a resident code leaves open, headers and escapes included.
double open_bits(const KvPart& part, bool rotated) {
  if (part.exact()) {
    return rotated ? 11.45 : 0;
  }
  switch (part.code) {
    case KvCode::plane:
      return 12.12 - part.bits;
    case KvCode::fp8:
      return 4.7;
    case KvCode::int8:
      return 4.4;
    case KvCode::nuq:
      return part.bits == 4 ? 7.9 : part.bits == 3 ? 9.2 : 10.2;
    case KvCode::affine:
      break;
  }
  switch (part.bits) {
    case 8:
      return 3.8;
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
      return (open_bits(format().key(), format().rotated) + open_bits(format().value(), format().rotated)) / 32;
  }
  return 1;
}

size_t Compressor::wire_bytes(int tokens, const KvShape& shape) const {
  const int pages = tokens / kPageTokens;
  const double plain = pages * static_cast<double>(page_bytes(shape)) * shape.layers;
  return static_cast<size_t>(plain * coded_share());
}

}  // namespace vericache
