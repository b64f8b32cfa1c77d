// PerLayer: another compressor for some layers; all of them store what they keep in one format, budgets may differ.
// Layers that keep every token extend with every fold, those that choose do so when decoding may begin. Called from the
// engine's thread, as compressor.h says.
#pragma once

#include <memory>
#include <vector>

#include "compress/compressor.h"

namespace vericache {

struct LayerOverride {
  int first = 0;
  int last = 0;  // included
  std::unique_ptr<Compressor> compressor;
};

class PerLayer final : public Compressor {
 public:
  // Ranges do not overlap, formats are equal.
  PerLayer(std::unique_ptr<Compressor> usual, std::vector<LayerOverride> overrides);
  std::string name() const override;
  KvFormat format() const override { return usual_->format(); }
  int query_window() const override;
  bool chooses_anew() const override;
  bool chooses_anew_in(int layer) const override { return of(layer).chooses_anew(); }
  bool observes() const override;
  bool reconstructs() const override;
  size_t notes_bytes(int max_tokens, const KvShape& shape) const override;
  int report_values(const KvShape& shape) const override;
  size_t scratch_bytes(int max_tokens, const KvShape& shape) const override;
  void set_scratch(std::byte* memory) override;
  int kept_tokens(int tokens) const override;
  int layer_tokens(int tokens, int layer, const KvShape& shape) const override {
    return of(layer).layer_tokens(tokens, layer, shape);
  }
  int layer_pages(int tokens, int layer, const KvShape& shape) const override {
    return of(layer).layer_pages(tokens, layer, shape);
  }
  void observe(Kernels& kernels, const FullLayer& full, const Attended& seen) override;
  void reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) override;
  bool compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                ResidentLayer& out) override;

 private:
  Compressor& of(int layer) const;
  // The largest of what value(compressor) says of each.
  template <typename Value>
  auto most(const Value& value) const;

  std::unique_ptr<Compressor> usual_;
  std::vector<LayerOverride> overrides_;
  std::vector<int> names_;  // of the tokens that a layer which keeps all has gained
};

}  // namespace vericache
