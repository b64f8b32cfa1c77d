#include "kv/host_tier.h"

namespace vericache {

FullKv::FullKv(const KvShape& shape, PagePool& extents, int max_pages)
    : pool_(extents),
      max_pages_(max_pages),
      extent_pages_(extent_pages(shape)),
      extents_per_layer_((max_pages + extent_pages_ - 1) / extent_pages_),
      page_bytes_(page_bytes(shape)),
      extents_(static_cast<size_t>(extents_for(max_pages, shape))),
      checksums_(static_cast<size_t>(shape.layers) * static_cast<size_t>(max_pages)) {
  for (std::byte*& extent : extents_) {
    extent = pool_.take();
    check(extent != nullptr, "admission reserves the host extents of a sequence");
  }
}

FullKv::~FullKv() {
  for (std::byte* extent : extents_) {
    pool_.give(extent);
  }
}

}  // namespace vericache
