// Ada-KV (Feng et al. 2024, section 4, algorithm 1): a layer's budget goes to its heads by their scores. Of all scores
// of a layer together the best are marked; a head's share of the marks, mixed with an even share, is its budget, in
// memory too. Wraps any method that scores tokens. The marks are counted on the device and read by the host at the next
// look: page tables are filled before the work is enqueued, and the engine's thread never waits. So a sequence's heads
// are even at its first look (the prompt's end) and have the shares of the look before from then on, on every backend.
// A head keeps at most kMostShare times the mean. Called from the engine's thread, as compressor.h says.
#pragma once

#include <memory>

#include "compress/scoring.h"

namespace vericache {

class AdaKv final : public ScoringCompressor {
 public:
  static constexpr int kMostShare = 4;

  // alpha: how much of a budget follows the marks; the rest is even.
  AdaKv(std::unique_ptr<ScoringCompressor> scorer, double alpha)
      : ScoringCompressor(scorer->format()), scorer_(std::move(scorer)), alpha_(alpha) {}
  std::string name() const override;
  int query_window() const override { return scorer_->query_window(); }
  bool observes() const override { return scorer_->observes(); }
  bool reconstructs() const override { return scorer_->reconstructs(); }
  size_t notes_bytes(int max_tokens, const KvShape& shape) const override {
    return scorer_->notes_bytes(max_tokens, shape);
  }
  int report_values(const KvShape& shape) const override { return shape.kv_heads; }  // marks of each head
  size_t scratch_bytes(int max_tokens, const KvShape& shape) const override;
  void set_scratch(std::byte* memory) override;
  int kept_tokens(int tokens) const override;
  int head_tokens(int tokens, int layer, int layers) const override {
    return scorer_->head_tokens(tokens, layer, layers);
  }
  int layer_pages(int tokens, int layer, const KvShape& shape) const override;
  void observe(Kernels& kernels, const FullLayer& full, const Attended& seen) override {
    scorer_->observe(kernels, full, seen);
  }
  void reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) override {
    scorer_->reconstruct(kernels, full, tokens, seen);
  }
  void score(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen, float* scores) override {
    scorer_->score(kernels, full, tokens, seen, scores);
  }

 private:
  void count_heads(const FullLayer& full, int tokens, const Attended& seen, std::span<int> counts) const override;
  void choose(Kernels& kernels, const FullLayer& full, const Attended& seen, const Choice& choice) override;

  std::unique_ptr<ScoringCompressor> scorer_;
  double alpha_;
};

// Shares out `mean` tokens a head: (1 - alpha) of them evenly, the rest by `marks` (as many as counts); no head gets
// more than `most` (at least mean). counts sum up to mean times their number. Without marks all is even.
void share_budget(std::span<const int> marks, double alpha, int mean, int most, std::span<int> counts);

}  // namespace vericache
