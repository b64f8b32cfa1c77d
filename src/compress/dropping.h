// DroppingCompressor: a method that drops tokens chooses, per head, which ones stay; storing those is shared and lies
// here. The kept tokens are stored as they are (their residual is the dropped tokens) or quantized (drop, then
// quantize). Called from the engine's thread, as compressor.h says.
#pragma once

#include "compress/compressor.h"

namespace vericache {

// How many of `tokens` tokens a head keeps: a share (at most 1) or a count (above 1), at least `least`.
struct Budget {
  double amount = 0.2;
  int least = kPageTokens;
  int tokens_of(int tokens) const;
};

class DroppingCompressor : public Compressor {
 public:
  KvFormat format() const final { return format_; }
  bool chooses_anew() const final { return true; }
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) final;

 protected:
  explicit DroppingCompressor(const KvFormat& format) : format_(format) {}
  // Writes kept_tokens(tokens) of the tokens [0, tokens) of every head, ascending, into chosen (kv_heads, stride):
  // device memory.
  virtual void choose(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, int* chosen,
                      int stride) = 0;
  std::string format_suffix() const;  // "+kivi:bits=4", or nothing

 private:
  KvFormat format_;
};

}  // namespace vericache
