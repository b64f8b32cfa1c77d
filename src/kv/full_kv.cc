#include "kv/full_kv.h"

#include <cstring>
#include <utility>

namespace vericache {

FullKv::FullKv(const KvShape& shape, ResidualCode code, PagePool& extents, PagePool& records, int max_pages)
    : FullKv(shape, code, &extents, nullptr, records, max_pages) {}
FullKv::FullKv(const KvShape& shape, ResidualCode code, BlockStore& store, PagePool& records, int max_pages)
    : FullKv(shape, code, nullptr, &store, records, max_pages) {}

FullKv::FullKv(const KvShape& shape, ResidualCode code, PagePool* extents, BlockStore* store, PagePool& records,
               int max_pages)
    : pool_(extents),
      store_(store),
      record_pool_(records),
      code_(code),
      max_pages_(max_pages),
      extents_per_layer_(extents_for(max_pages, shape, code) / shape.layers),
      extent_bytes_(extent_bytes(shape)),
      page_bound_(stored_page_bound(shape, code)),
      held_(static_cast<size_t>(shape.layers)),
      extents_(store == nullptr ? extent_of(shape.layers, 0) : 0),
      blocks_(store != nullptr ? extent_of(shape.layers, 0) : 0),
      checksums_(reinterpret_cast<uint64_t*>(records.take())),
      ends_(reinterpret_cast<uint32_t*>(checksums_ + record(shape.layers, 0))) {
  check(checksums_ != nullptr && records.block_bytes() >= record_bytes(shape, max_pages),
        "there is a block of records for every sequence");
  occupy();
}

void FullKv::occupy() {
  for (size_t layer = 0; layer < held_.size(); ++layer) {
    for (int& held = held_[layer]; held < extents_per_layer_; ++held) {
      const size_t extent = extent_of(static_cast<int>(layer), held);
      if (in_store()) {
        blocks_[extent] = store_->take();
        check(blocks_[extent] >= 0, "admission reserves the blocks of a sequence");
      } else {
        extents_[extent] = pool_->take();
        check(extents_[extent] != nullptr, "admission reserves the host extents of a sequence");
      }
    }
  }
}

int FullKv::keep(int layer, int extents) {
  int& held = held_[static_cast<size_t>(layer)];
  const int given = std::max(held - extents, 0);
  while (held > extents) {
    const size_t extent = extent_of(layer, --held);
    if (in_store()) {
      store_->give(std::exchange(blocks_[extent], -1));
    } else {
      pool_->give(std::exchange(extents_[extent], nullptr));
    }
  }
  return given;
}

int FullKv::shrink() {
  const int pages = stored();
  if (pages == accounted_) {
    return 0;
  }
  accounted_ = pages;
  int given = 0;
  for (int layer = 0; layer < static_cast<int>(held_.size()); ++layer) {
    const size_t most = begin(layer, pages) + static_cast<size_t>(max_pages_ - pages) * page_bound_;
    given += keep(layer, static_cast<int>((most + extent_bytes_ - 1) / extent_bytes_));
  }
  return given;
}

void FullKv::vacate() {
  set_stored(0);
  accounted_ = 0;
  for (int layer = 0; layer < static_cast<int>(held_.size()); ++layer) {
    keep(layer, 0);
  }
}

bool FullKv::reachable(const Device& host) const {
  return std::all_of(extents_.begin(), extents_.end(), [&](const std::byte* extent) {
    const size_t end = extent == nullptr ? 0 : static_cast<size_t>(extent - pool_->memory()) + extent_bytes_;
    return host.ready(pool_->memory(), end) >= end;
  });
}

bool FullKv::read(int layer, size_t begin, std::span<std::byte> to) const {
  bool read = true;
  for_each_extent(layer, begin, begin + to.size(), [&](size_t extent, size_t in_extent, size_t offset, size_t bytes) {
    const std::span<std::byte> piece = to.subspan(offset - begin, bytes);
    if (in_store()) {
      read = store_->read(blocks_[extent], in_extent, piece) && read;
    } else {
      std::memcpy(piece.data(), extents_[extent] + in_extent, bytes);
    }
  });
  return read;
}

bool FullKv::write(int layer, size_t begin, std::span<const std::byte> from) {
  bool written = true;
  for_each_extent(layer, begin, begin + from.size(), [&](size_t extent, size_t in_extent, size_t offset, size_t bytes) {
    const std::span<const std::byte> piece = from.subspan(offset - begin, bytes);
    if (in_store()) {
      written = store_->write(blocks_[extent], in_extent, piece) && written;
    } else {
      std::memcpy(extents_[extent] + in_extent, piece.data(), bytes);
    }
  });
  return written;
}

void FullKv::flip_bit(int layer, size_t offset, int bit) {
  std::byte byte{};
  read(layer, offset, {&byte, 1});
  byte ^= std::byte{1} << bit;
  write(layer, offset, {&byte, 1});
}

FullKv::~FullKv() {
  vacate();
  record_pool_.give(reinterpret_cast<std::byte*>(checksums_));
}

}  // namespace vericache
