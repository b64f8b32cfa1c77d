#include "kv/host_tier.h"

#include <algorithm>

namespace vericache {

FullKv::FullKv(const KvShape& shape, PagePool& extents, PagePool& checksums, int max_pages)
    : pool_(extents),
      checksum_pool_(checksums),
      max_pages_(max_pages),
      extent_pages_(extent_pages(shape)),
      extents_per_layer_((max_pages + extent_pages_ - 1) / extent_pages_),
      page_bytes_(page_bytes(shape)),
      extents_(static_cast<size_t>(extents_for(max_pages, shape))),
      checksums_(reinterpret_cast<uint64_t*>(checksums.take())) {
  check(checksums_ != nullptr && checksums.block_bytes() >= checksum_bytes(shape, max_pages),
        "there is a block of checksums for every sequence");
  for (std::byte*& extent : extents_) {
    extent = pool_.take();
    check(extent != nullptr, "admission reserves the host extents of a sequence");
  }
}

bool FullKv::reachable(const Device& host) const {
  const size_t extent_bytes = pool_.block_bytes();
  return std::all_of(extents_.begin(), extents_.end(), [&](const std::byte* extent) {
    const size_t end = static_cast<size_t>(extent - pool_.memory()) + extent_bytes;
    return host.ready(pool_.memory(), end) >= end;
  });
}

FullKv::~FullKv() {
  for (std::byte* extent : extents_) {
    pool_.give(extent);
  }
  checksum_pool_.give(reinterpret_cast<std::byte*>(checksums_));
}

}  // namespace vericache
