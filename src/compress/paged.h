// PagedCompressor: keeps every token, page by page, in some format: bf16 as computed ("none") or affine codes (KIVI,
// Liu et al. 2024, sections 3 and 4: keys per channel, values per token; a group is the 64 tokens of a page). Extends;
// never looks back.
#pragma once

#include <string>

#include "compress/compressor.h"

namespace vericache {

class PagedCompressor final : public Compressor {
 public:
  explicit PagedCompressor(const KvFormat& format) : format_(format) {}
  std::string name() const override;
  KvFormat format() const override { return format_; }
  ResidualCode residual_code() const override { return format_.exact() ? ResidualCode::plain : ResidualCode::resident; }
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) override;

 private:
  KvFormat format_;
};

}  // namespace vericache
