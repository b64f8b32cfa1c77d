// ScoringCompressor: a method that drops tokens says how much each is worth, per head; keep-the-best is shared and lies
// here. The kept tokens are stored as they are (their residual is the dropped tokens) or quantized (drop, then
// quantize).
#pragma once

#include <span>
#include <vector>

#include "compress/compressor.h"

namespace vericache {

// How many of `tokens` tokens a head keeps: a share (at most 1) or a count (above 1), at least `least`.
struct Budget {
  double amount = 0.2;
  int least = kPageTokens;
  int tokens_of(int tokens) const;
};

class ScoringCompressor : public Compressor {
 public:
  KvFormat format() const final { return format_; }
  bool chooses_anew() const final { return true; }
  size_t wire_bytes(int tokens, const KvShape& shape) const final;
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) final;

 protected:
  explicit ScoringCompressor(const KvFormat& format) : format_(format) {}
  // scores (kv_heads, tokens) of tokens [0, tokens); +inf is always kept. Higher is better; ties fall to the later
  // token.
  virtual void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen,
                     std::span<float> scores) = 0;
  std::string format_suffix() const;  // "+kivi:bits=4", or nothing

 private:
  void keep(Kernels& kernels, const FullLayer& full, int head, ResidentLayer& out) const;

  KvFormat format_;
  std::vector<float> scores_;  // grows to (kv_heads, longest context)
};

}  // namespace vericache
