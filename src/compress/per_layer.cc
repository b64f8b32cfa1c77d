#include "compress/per_layer.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace vericache {

PerLayer::PerLayer(std::unique_ptr<Compressor> usual, std::vector<LayerOverride> overrides)
    : usual_(std::move(usual)), overrides_(std::move(overrides)) {
  for (const LayerOverride& one : overrides_) {
    check(one.compressor->format() == usual_->format(), "all layers store in one format");
  }
}

template <typename Value>
auto PerLayer::most(const Value& value) const {
  auto most = value(*usual_);
  for (const LayerOverride& one : overrides_) {
    most = std::max(most, value(*one.compressor));
  }
  return most;
}

Compressor& PerLayer::of(int layer) const {
  for (const LayerOverride& one : overrides_) {
    if (layer >= one.first && layer <= one.last) {
      return *one.compressor;
    }
  }
  return *usual_;
}

std::string PerLayer::name() const {
  std::string name = usual_->name();
  for (const LayerOverride& one : overrides_) {
    name += one.first == one.last ? fmt::format(";layers={}", one.first)
                                  : fmt::format(";layers={}-{}", one.first, one.last);
    name += ":" + one.compressor->name();
  }
  return name;
}

int PerLayer::query_window() const {
  return most([](const Compressor& one) { return one.query_window(); });
}
bool PerLayer::chooses_anew() const {
  return most([](const Compressor& one) { return one.chooses_anew(); });
}
bool PerLayer::observes() const {
  return most([](const Compressor& one) { return one.observes(); });
}
bool PerLayer::reconstructs() const {
  return most([](const Compressor& one) { return one.reconstructs(); });
}
size_t PerLayer::notes_bytes(int max_tokens, const KvShape& shape) const {
  return most([&](const Compressor& one) { return one.notes_bytes(max_tokens, shape); });
}
int PerLayer::report_values(const KvShape& shape) const {
  return most([&](const Compressor& one) { return one.report_values(shape); });
}
size_t PerLayer::scratch_bytes(int max_tokens, const KvShape& shape) const {
  return most([&](const Compressor& one) { return one.scratch_bytes(max_tokens, shape); });
}
int PerLayer::kept_tokens(int tokens) const {
  return most([&](const Compressor& one) { return one.kept_tokens(tokens); });
}

void PerLayer::set_scratch(std::byte* memory) {
  usual_->set_scratch(memory);
  for (const LayerOverride& one : overrides_) {
    one.compressor->set_scratch(memory);
  }
}

void PerLayer::observe(Kernels& kernels, const FullLayer& full, const Attended& seen) {
  if (Compressor& one = of(full.layer); one.observes()) {
    one.observe(kernels, full, seen);
  }
}

void PerLayer::reconstruct(Kernels& kernels, const FullLayer& full, int tokens, const Attended& seen) {
  of(full.layer).reconstruct(kernels, full, tokens, seen);
}

bool PerLayer::compress(Kernels& kernels, const FullLayer& full, TokenRange fresh, const Attended& seen,
                        ResidentLayer& out) {
  Compressor& one = of(full.layer);
  if (!one.compress(kernels, full, fresh, seen, out)) {
    return false;
  }
  if (!one.chooses_anew() && out.chosen() != nullptr) {
    // The wire asks of every layer which tokens it holds.
    names_.resize(static_cast<size_t>(fresh.end - fresh.begin));
    std::iota(names_.begin(), names_.end(), fresh.begin);
    for (int head = 0; head < full.shape.kv_heads; ++head) {
      int* chosen = out.chosen() + static_cast<ptrdiff_t>(head) * out.chosen_stride() + fresh.begin;
      kernels.upload(reinterpret_cast<std::byte*>(chosen), names_.data(), names_.size() * sizeof(int));
    }
  }
  return true;
}

}  // namespace vericache
