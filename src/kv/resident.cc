#include "kv/resident.h"

namespace vericache {
namespace {

int pages_for(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

}  // namespace

ResidentLayer::ResidentLayer(const KvShape& shape, const KvFormat& format, PagePool& pool, int max_pages)
    : shape_(shape),
      format_(format),
      pool_(&pool),
      max_pages_(max_pages),
      tokens_(static_cast<size_t>(shape.kv_heads)),
      table_(static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(max_pages)),
      positions_(static_cast<size_t>(shape.kv_heads)) {
  check(pool.block_bytes() >= head_page_bytes(format, shape), "resident pages fit the pool's blocks");
}

bool ResidentLayer::resize(int head, int tokens) {
  check(pages_for(tokens) <= max_pages_, "a head keeps no more tokens than were reserved for it");
  int& held = tokens_[static_cast<size_t>(head)];
  std::byte** row = table_.data() + static_cast<size_t>(head) * static_cast<size_t>(max_pages_);
  for (int page = pages_for(held); page < pages_for(tokens); ++page) {
    row[page] = pool_->take();
    if (row[page] == nullptr) {
      return false;
    }
    held = (page + 1) * kPageTokens;
  }
  for (int page = pages_for(held); page > pages_for(tokens); --page) {
    pool_->give(row[page - 1]);
  }
  held = tokens;
  return true;
}

void ResidentLayer::clear() {
  // A moved-from layer has no heads left.
  for (size_t head = 0; head < tokens_.size(); ++head) {
    resize(static_cast<int>(head), 0);
    positions_[head].clear();
  }
}

KvView ResidentLayer::view() const {
  KvView view;
  view.format = format_;
  view.head_pages = const_cast<std::byte**>(table_.data());
  view.page_stride = max_pages_;
  view.tokens = tokens_.data();
  return view;
}

int ResidentLayer::pages() const {
  int pages = 0;
  for (const int tokens : tokens_) {
    pages += pages_for(tokens);
  }
  return pages;
}

ResidentKv::ResidentKv(const KvShape& shape, const KvFormat& format, PagePool& pool, int max_tokens)
    : head_page_bytes_(head_page_bytes(format, shape)) {
  layers_.reserve(static_cast<size_t>(shape.layers));
  for (int i = 0; i < shape.layers; ++i) {
    layers_.emplace_back(shape, format, pool, pages_for(max_tokens));
  }
}

void ResidentKv::clear() {
  for (ResidentLayer& layer : layers_) {
    layer.clear();
  }
}

size_t ResidentKv::bytes() const {
  size_t pages = 0;
  for (const ResidentLayer& layer : layers_) {
    pages += static_cast<size_t>(layer.pages());
  }
  return pages * head_page_bytes_;
}

}  // namespace vericache
