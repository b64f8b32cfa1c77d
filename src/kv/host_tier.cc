#include "kv/host_tier.h"

namespace vericache {

FullKv::FullKv(const KvShape& shape, ResidualCode code, PagePool& extents, PagePool& records, int max_pages)
    : pool_(extents),
      record_pool_(records),
      code_(code),
      max_pages_(max_pages),
      extents_per_layer_(extents_for(max_pages, shape, code) / shape.layers),
      extent_bytes_(extent_bytes(shape)),
      extents_(static_cast<size_t>(extents_for(max_pages, shape, code))),
      checksums_(reinterpret_cast<uint64_t*>(records.take())),
      ends_(reinterpret_cast<uint32_t*>(checksums_ + record(shape.layers, 0))) {
  check(checksums_ != nullptr && records.block_bytes() >= record_bytes(shape, max_pages),
        "there is a block of records for every sequence");
  for (std::byte*& extent : extents_) {
    extent = pool_.take();
    check(extent != nullptr, "admission reserves the host extents of a sequence");
  }
}

bool FullKv::reachable(const Device& host) const {
  return std::all_of(extents_.begin(), extents_.end(), [&](const std::byte* extent) {
    const size_t end = static_cast<size_t>(extent - pool_.memory()) + extent_bytes_;
    return host.ready(pool_.memory(), end) >= end;
  });
}

FullKv::~FullKv() {
  for (std::byte* extent : extents_) {
    pool_.give(extent);
  }
  record_pool_.give(reinterpret_cast<std::byte*>(checksums_));
}

}  // namespace vericache
