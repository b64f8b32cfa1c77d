// PagedCompressor: keeps every token, page by page, in some format. Extends; never looks back.
//   none   bf16 as computed
//   kivi   affine codes, keys per channel, values per token; a group is the 64 tokens of a page (KIVI, Liu et al. 2024,
//          sections 3 and 4)
//   quarot kivi's codes of keys and values that were rotated (QuaRot, Ashkboos et al. 2024, section 4.3; rotation.h),
//          keys of up to 4 bits rounded by what queries ask of them (LDLQ; key_rounding.h)
//   kvquant codes of levels that are fitted to each page, outliers apart (KVQuant, Hooper et al. 2024, sections 3.1 to
//          3.4; nuq_codes.h says what is done without a calibration set)
//   plane  the leading bits of every bf16, its exponent counted from the token's largest: what is missing are whole
//   bits fp8    E4M3 with a power of two per token (Micikevicius et al. 2022, section 3; Kwon et al. 2023 serve KV so)
//   int8   symmetric, a scale per token and head (SmoothQuant, Xiao et al. 2023, section 2: per-token)
// Called from the engine's thread, as compressor.h says.
#pragma once

#include <string>

#include "compress/compressor.h"

namespace vericache {

class PagedCompressor : public Compressor {
 public:
  explicit PagedCompressor(const KvFormat& format) : format_(format) {}
  std::string name() const override;
  KvFormat format() const final { return format_; }
  ResidualCode residual_code() const final { return format_.exact() ? ResidualCode::plain : ResidualCode::resident; }
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) final;

 private:
  KvFormat format_;
};

}  // namespace vericache
