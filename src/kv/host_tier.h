// Host tier: the full KV of every sequence in host memory, in extents of one layer, with a checksum per page.
// Reservation on the engine's thread; pages are written and read by the wire's workers, each page by one of them at a
// time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/device.h"
#include "backend/kv_view.h"
#include "kv/page_pool.h"

namespace vericache {

// An extent holds pages of one layer that lie together: 1 MiB or more, the size from which a transfer runs at the
// link's speed.
inline int extent_pages(const KvShape& shape) {
  constexpr size_t kExtentBytes = size_t{1} << 20;
  return static_cast<int>((kExtentBytes + page_bytes(shape) - 1) / page_bytes(shape));
}
inline size_t extent_bytes(const KvShape& shape) {
  return static_cast<size_t>(extent_pages(shape)) * page_bytes(shape);
}
// Extents that `pages` pages of every layer take.
inline int extents_for(int pages, const KvShape& shape) {
  return (pages + extent_pages(shape) - 1) / extent_pages(shape) * shape.layers;
}

// The full KV of one sequence outside device memory: whole pages [0, stored()).
class FullKv {
 public:
  // Takes room for max_pages pages of every layer, and a block of checksum_bytes(...); the pools must have it.
  FullKv(const KvShape& shape, PagePool& extents, PagePool& checksums, int max_pages);
  static size_t checksum_bytes(const KvShape& shape, int max_pages) {
    return static_cast<size_t>(shape.layers) * static_cast<size_t>(max_pages) * sizeof(uint64_t);
  }
  ~FullKv();
  FullKv(const FullKv&) = delete;
  FullKv& operator=(const FullKv&) = delete;

  // Whether lanes reach all of its extents by now; see Device::ready. They are blocks of one allocation of `host`.
  bool reachable(const Device& host) const;
  int max_pages() const { return max_pages_; }
  int stored() const { return stored_.load(std::memory_order_acquire); }
  void set_stored(int pages) { stored_.store(pages, std::memory_order_release); }

  std::byte* page(int layer, int page) const {
    return extents_[static_cast<size_t>(layer) * static_cast<size_t>(extents_per_layer_) +
                    static_cast<size_t>(page / extent_pages_)] +
           static_cast<size_t>(page % extent_pages_) * page_bytes_;
  }
  uint64_t* checksums(int layer) const { return checksums_ + checksum_index(layer, 0); }
  uint64_t& checksum(int layer, int page) { return checksums_[checksum_index(layer, page)]; }
  uint64_t checksum(int layer, int page) const { return checksums_[checksum_index(layer, page)]; }

 private:
  size_t checksum_index(int layer, int page) const {
    return static_cast<size_t>(layer) * static_cast<size_t>(max_pages_) + static_cast<size_t>(page);
  }

  PagePool& pool_;
  PagePool& checksum_pool_;
  int max_pages_;
  int extent_pages_;
  int extents_per_layer_;
  size_t page_bytes_;
  std::atomic<int> stored_ = 0;
  std::vector<std::byte*> extents_;  // (layers, extents_per_layer)
  uint64_t* checksums_;              // (layers, max_pages): host memory that the device reaches
};

}  // namespace vericache
