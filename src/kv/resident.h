// Resident KV: the compressed part of a sequence, in device memory, per layer and head. Heads may keep different tokens
// and counts. Changed by the engine's thread while a full pass has the layer; the wire reads a layer's exact part to
// join it with its residual.
#pragma once

#include <span>
#include <vector>

#include "backend/kv_view.h"
#include "kv/page_pool.h"

namespace vericache {

// One layer. Head h holds tokens(h) tokens in ceil(tokens / 64) head pages.
class ResidentLayer {
 public:
  ResidentLayer(const KvShape& shape, const KvFormat& format, PagePool& pool, int max_pages);
  ~ResidentLayer() { clear(); }
  ResidentLayer(ResidentLayer&& other) noexcept = default;
  ResidentLayer(const ResidentLayer&) = delete;
  ResidentLayer& operator=(const ResidentLayer&) = delete;

  // Makes room for exactly `tokens` tokens of a head; pages that stay keep what they hold. false: the pool is empty.
  bool resize(int head, int tokens);
  void clear();

  int tokens(int head) const { return tokens_[static_cast<size_t>(head)]; }
  std::byte* head_page(int head, int page) const {
    return table_[static_cast<size_t>(head) * static_cast<size_t>(max_pages_) + static_cast<size_t>(page)];
  }
  // Which tokens a head holds, ascending; slot i holds positions(head)[i]. Empty for compressors that keep all tokens.
  std::vector<int>& positions(int head) { return positions_[static_cast<size_t>(head)]; }
  std::span<const int> positions(int head) const { return positions_[static_cast<size_t>(head)]; }

  const KvShape& shape() const { return shape_; }
  const KvFormat& format() const { return format_; }
  KvView view() const;
  int pages() const;  // head pages held, all heads

 private:
  KvShape shape_;
  KvFormat format_;
  PagePool* pool_;
  int max_pages_;
  std::vector<int> tokens_;                  // (kv_heads)
  std::vector<std::byte*> table_;            // (kv_heads, max_pages)
  std::vector<std::vector<int>> positions_;  // (kv_heads)
};

class ResidentKv {
 public:
  // max_tokens: the most that a head may keep.
  ResidentKv(const KvShape& shape, const KvFormat& format, PagePool& pool, int max_tokens);

  ResidentLayer& layer(int i) { return layers_[static_cast<size_t>(i)]; }
  const ResidentLayer& layer(int i) const { return layers_[static_cast<size_t>(i)]; }
  void clear();
  size_t bytes() const;  // of the pages held

 private:
  size_t head_page_bytes_;
  std::vector<ResidentLayer> layers_;
};

}  // namespace vericache
