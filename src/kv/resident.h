// Resident KV: the compressed part of a sequence, in device memory, per layer and head. Heads may keep different tokens
// and counts. Changed by the engine's thread while a full pass has the layer; the wire reads a layer's exact part to
// join it with its residual.
#pragma once

#include <span>
#include <vector>

#include "backend/device.h"
#include "backend/kv_view.h"
#include "kv/page_pool.h"

namespace vericache {

// Where attention finds the pages of a sequence, in device memory; taken from a pool, one block a sequence.
// An addressable device reads the host's own tables: nothing but the chosen tokens lies here then.
struct ResidentIndex {
  std::byte* memory = nullptr;
  int max_pages = 0;      // of a head
  int chosen_stride = 0;  // tokens that a head may keep; 0 where all are kept
  bool mirrored = false;  // the device has a copy of the tables of its own

  static size_t bytes(const KvShape& shape, int max_pages, int chosen_stride, bool mirrored);
};

// One layer. Head h holds tokens(h) tokens in ceil(tokens / 64) head pages.
class ResidentLayer {
 public:
  ResidentLayer(const KvShape& shape, const KvFormat& format, PagePool& pool, const ResidentIndex& index, int layer);
  ~ResidentLayer() { clear(); }
  ResidentLayer(ResidentLayer&& other) noexcept = default;
  ResidentLayer(const ResidentLayer&) = delete;
  ResidentLayer& operator=(const ResidentLayer&) = delete;

  // Makes room for exactly `tokens` tokens of a head; pages that stay keep what they hold. false: the pool is empty.
  bool resize(int head, int tokens);
  void clear();
  // Makes the pages known to the work that follows on the lane.
  void publish(Lane& lane);

  int tokens(int head) const { return tokens_[static_cast<size_t>(head)]; }
  std::byte* head_page(int head, int page) const {
    return table_[static_cast<size_t>(head) * static_cast<size_t>(max_pages_) + static_cast<size_t>(page)];
  }
  // Which tokens a head holds, ascending; slot i holds chosen()[head * chosen_stride() + i]. Device memory; null for
  // compressors that keep all tokens.
  int* chosen() const { return chosen_; }
  int chosen_stride() const { return chosen_stride_; }

  const KvShape& shape() const { return shape_; }
  const KvFormat& format() const { return format_; }
  KvView view() const;  // device memory; with the counts of the last settle
  int pages() const;    // head pages held, all heads

 private:
  friend class ResidentKv;

  KvShape shape_;
  KvFormat format_;
  PagePool* pool_;
  int max_pages_;
  int chosen_stride_;
  std::vector<int> tokens_;        // (kv_heads)
  std::vector<int> settled_;       // (kv_heads): tokens that attention sees
  std::vector<std::byte*> table_;  // (kv_heads, max_pages)
  std::byte** device_table_;       // the same in device memory, null where that reads table_
  int* device_settled_;            // as settled_
  int* chosen_;                    // (kv_heads, chosen_stride)
};

class ResidentKv {
 public:
  ResidentKv(const KvShape& shape, const KvFormat& format, PagePool& pool, const ResidentIndex& index);

  ResidentLayer& layer(int i) { return layers_[static_cast<size_t>(i)]; }
  const ResidentLayer& layer(int i) const { return layers_[static_cast<size_t>(i)]; }
  // Attention that follows on the lane sees every layer as it is now: the counts of all layers change between passes,
  // never under a draft.
  void settle(Lane& lane);
  void clear();
  size_t bytes() const;  // of the pages held

 private:
  size_t head_page_bytes_;
  std::vector<ResidentLayer> layers_;
};

}  // namespace vericache
