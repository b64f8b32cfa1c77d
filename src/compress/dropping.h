// DroppingCompressor: a method that drops tokens chooses, per head, which ones stay; storing those is shared and lies
// here. The kept tokens are stored as they are (their residual is the dropped tokens) or quantized (drop, then
// quantize). Called from the engine's thread, as compressor.h says.
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

class DroppingCompressor : public Compressor {
 public:
  KvFormat format() const final { return format_; }
  bool chooses_anew() const final { return true; }
  // What a head of this layer keeps, the mean over its heads.
  virtual int head_tokens(int tokens, int layer, int layers) const {
    (void)layer;
    (void)layers;
    return kept_tokens(tokens);
  }
  int layer_tokens(int tokens, int layer, const KvShape& shape) const final {
    return shape.kv_heads * head_tokens(tokens, layer, shape.layers);
  }
  int layer_pages(int tokens, int layer, const KvShape& shape) const override;
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) final;

 protected:
  // Which tokens of each head stay, and where the choice is written: ascending into chosen (kv_heads, stride).
  struct Choice {
    int tokens = 0;               // to choose from: [0, tokens)
    int count = 0;                // of every head; where counts is given, the most of one
    const int* counts = nullptr;  // (kv_heads), or null
    int* chosen = nullptr;
    int stride = 0;
  };

  explicit DroppingCompressor(const KvFormat& format) : format_(format) {}
  // counts (kv_heads): what each head of the layer keeps now. Heads that differ sum up to layer_tokens(), and their
  // counts lie at the beginning of the scratch: count_bytes() of it.
  virtual void count_heads(const FullLayer& full, int tokens, const Attended& seen, std::span<int> counts) const;
  virtual void choose(Kernels& kernels, const FullLayer& full, const Attended& seen, const Choice& choice) = 0;
  static size_t count_bytes(const KvShape& shape) {
    return (static_cast<size_t>(shape.kv_heads) * sizeof(int) + 63) / 64 * 64;
  }
  std::string format_suffix() const;  // "+kivi:bits=4", or nothing

 private:
  KvFormat format_;
  std::vector<int> counts_;
};

}  // namespace vericache
