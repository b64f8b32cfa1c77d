#include "kv/host_tier.h"

#include <cstring>

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
      checksums_(reinterpret_cast<uint64_t*>(records.take())),
      ends_(reinterpret_cast<uint32_t*>(checksums_ + record(shape.layers, 0))) {
  check(checksums_ != nullptr && records.block_bytes() >= record_bytes(shape, max_pages),
        "there is a block of records for every sequence");
  for (int i = 0; i < extents_for(max_pages, shape, code); ++i) {
    if (store_ != nullptr) {
      blocks_.push_back(store_->take());
      check(blocks_.back() >= 0, "admission reserves the blocks of a sequence");
    } else {
      extents_.push_back(pool_->take());
      check(extents_.back() != nullptr, "admission reserves the host extents of a sequence");
    }
  }
}

bool FullKv::reachable(const Device& host) const {
  return std::all_of(extents_.begin(), extents_.end(), [&](const std::byte* extent) {
    const size_t end = static_cast<size_t>(extent - pool_->memory()) + extent_bytes_;
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
  for (std::byte* extent : extents_) {
    pool_->give(extent);
  }
  for (const int block : blocks_) {
    store_->give(block);
  }
  record_pool_.give(reinterpret_cast<std::byte*>(checksums_));
}

}  // namespace vericache
