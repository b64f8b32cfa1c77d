// Full KV of every sequence outside device memory, in extents of one layer, in the form in which it crosses the wire,
// with a checksum per page: the host tier, in host memory, or blocks of a store, where that has no room. Extents are
// taken and given back on the engine's thread; pages are written and read by the wire's workers, each page by one of
// them at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "backend/device.h"
#include "backend/kv_view.h"
#include "backend/residual_code.h"
#include "kv/block_store.h"
#include "kv/page_pool.h"

namespace vericache {

// An extent holds bytes of one layer that lie together: 1 MiB or more, the size from which a transfer runs at the
// link's speed. A whole number of plain pages.
inline size_t extent_bytes(const KvShape& shape) {
  constexpr size_t kExtentBytes = size_t{1} << 20;
  return (kExtentBytes + page_bytes(shape) - 1) / page_bytes(shape) * page_bytes(shape);
}
// The most bytes that a page takes in the host tier.
inline size_t stored_page_bound(const KvShape& shape, ResidualCode code) {
  return code == ResidualCode::plain ? page_bytes(shape) : residual_bound(shape);
}
// Extents that `pages` pages of every layer take at most.
inline int extents_for(int pages, const KvShape& shape, ResidualCode code) {
  const size_t bytes = static_cast<size_t>(pages) * stored_page_bound(shape, code);
  return static_cast<int>((bytes + extent_bytes(shape) - 1) / extent_bytes(shape)) * shape.layers;
}

// The full KV of one sequence outside device memory: whole pages [0, stored()). The pages of a layer are a stream of
// bytes, one behind the other, that runs through its extents.
class FullKv {
 public:
  // Takes room for max_pages pages of every layer, however they are coded, and a block of record_bytes(...); the pools
  // and the store must have it.
  FullKv(const KvShape& shape, ResidualCode code, PagePool& extents, PagePool& records, int max_pages);
  FullKv(const KvShape& shape, ResidualCode code, BlockStore& store, PagePool& records, int max_pages);
  // Checksums and ends.
  static size_t record_bytes(const KvShape& shape, int max_pages) {
    return static_cast<size_t>(shape.layers) * static_cast<size_t>(max_pages) * (sizeof(uint64_t) + sizeof(uint32_t));
  }
  ~FullKv();
  FullKv(const FullKv&) = delete;
  FullKv& operator=(const FullKv&) = delete;

  bool in_store() const { return store_ != nullptr; }
  // Extents, or blocks of the store, that it has now.
  int extents() const { return std::accumulate(held_.begin(), held_.end(), 0); }
  // Gives back those that pages not stored yet cannot need, however they are coded; how many. What is stored may be
  // read meanwhile, and the next pages written.
  int shrink();
  int accounted() const { return accounted_; }  // pages stored when that was last looked at
  // Forgets what is stored, gives back all, and takes as many as at first: no page is read or written meanwhile.
  void vacate();
  void occupy();
  // Whether lanes reach all of its extents by now; see Device::ready. They are blocks of one allocation of `host`.
  bool reachable(const Device& host) const;
  ResidualCode code() const { return code_; }
  int max_pages() const { return max_pages_; }
  int stored() const { return stored_.load(std::memory_order_acquire); }
  void set_stored(int pages) { stored_.store(pages, std::memory_order_release); }

  // Where a page begins and ends in its layer's stream. A page has its place once it is stored, or was placed.
  size_t begin(int layer, int page) const { return page == 0 ? 0 : end(layer, page - 1); }
  size_t end(int layer, int page) const { return ends_[record(layer, page)] * kResidualUnit; }
  // Pages are placed in order; what was placed behind is forgotten.
  void place(int layer, int page, size_t bytes) {
    ends_[record(layer, page)] = static_cast<uint32_t>((begin(layer, page) + bytes) / kResidualUnit);
  }
  // In units of kResidualUnit. Host memory that the device reaches.
  const uint32_t* ends(int layer) const { return ends_ + record(layer, 0); }
  // visit(std::byte* memory, size_t offset, size_t bytes) for the pieces of bytes [begin, end) of a layer's stream that
  // lie together; offset is that in the stream. Not of a sequence in a store.
  template <typename Visit>
  void for_each_piece(int layer, size_t begin, size_t end, const Visit& visit) const {
    for_each_extent(layer, begin, end, [&](size_t extent, size_t in_extent, size_t offset, size_t bytes) {
      check(extents_[extent] != nullptr, "a page lies in extents of its sequence");
      visit(extents_[extent] + in_extent, offset, bytes);
    });
  }
  // Bytes of a layer's stream from `begin` on, wherever they are. Blocks where they are in a store; one thread may read
  // and another write. false: the store failed, and what `to` holds is anything; checksums tell.
  bool read(int layer, size_t begin, std::span<std::byte> to) const;
  bool write(int layer, size_t begin, std::span<const std::byte> from);
  void flip_bit(int layer, size_t offset, int bit = 0);  // for tests: of that byte

  uint64_t* checksums(int layer) const { return checksums_ + record(layer, 0); }
  uint64_t& checksum(int layer, int page) { return checksums_[record(layer, page)]; }
  uint64_t checksum(int layer, int page) const { return checksums_[record(layer, page)]; }

 private:
  FullKv(const KvShape& shape, ResidualCode code, PagePool* extents, BlockStore* store, PagePool& records,
         int max_pages);
  // Gives back all but the first so many extents of a layer; how many.
  int keep(int layer, int extents);
  // visit(index of the extent, offset in it, offset in the stream, bytes)
  template <typename Visit>
  void for_each_extent(int layer, size_t begin, size_t end, const Visit& visit) const {
    while (begin < end) {
      const size_t in_extent = begin % extent_bytes_;
      const size_t bytes = std::min(end - begin, extent_bytes_ - in_extent);
      visit(extent_of(layer, static_cast<int>(begin / extent_bytes_)), in_extent, begin, bytes);
      begin += bytes;
    }
  }
  size_t extent_of(int layer, int index) const {
    return static_cast<size_t>(layer) * static_cast<size_t>(extents_per_layer_) + static_cast<size_t>(index);
  }
  size_t record(int layer, int page) const {
    return static_cast<size_t>(layer) * static_cast<size_t>(max_pages_) + static_cast<size_t>(page);
  }

  PagePool* pool_;     // of its extents in host memory, or
  BlockStore* store_;  // of its blocks
  PagePool& record_pool_;
  ResidualCode code_;
  int max_pages_;
  int extents_per_layer_;
  size_t extent_bytes_;
  size_t page_bound_;
  std::atomic<int> stored_ = 0;
  int accounted_ = 0;
  std::vector<int> held_;            // (layers): the first so many of its extents are there
  std::vector<std::byte*> extents_;  // (layers, extents_per_layer); null where there is none
  std::vector<int> blocks_;          // the same, in a store; -1
  uint64_t* checksums_;              // (layers, max_pages), of plain pages: host memory that the device reaches
  uint32_t* ends_;                   // (layers, max_pages): behind the checksums
};

}  // namespace vericache
