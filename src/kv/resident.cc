#include "kv/resident.h"

namespace vericache {
namespace {

int pages_for(int tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// An index block: tables of all layers, then counts, then chosen tokens.
struct IndexSizes {
  size_t table = 0;  // of one layer
  size_t counts = 0;
  size_t chosen = 0;
};
IndexSizes index_sizes(const KvShape& shape, int max_pages, int chosen_stride, bool mirrored) {
  const size_t heads = static_cast<size_t>(shape.kv_heads);
  IndexSizes sizes;
  if (mirrored) {
    sizes.table = heads * static_cast<size_t>(max_pages) * sizeof(std::byte*);
    sizes.counts = heads * sizeof(int);
  }
  sizes.chosen = heads * static_cast<size_t>(chosen_stride) * sizeof(int);
  return sizes;
}

}  // namespace

size_t ResidentIndex::bytes(const KvShape& shape, int max_pages, int chosen_stride, bool mirrored) {
  const IndexSizes sizes = index_sizes(shape, max_pages, chosen_stride, mirrored);
  const size_t bytes = static_cast<size_t>(shape.layers) * (sizes.table + sizes.counts + sizes.chosen);
  return (bytes + 63) / 64 * 64;
}

ResidentLayer::ResidentLayer(const KvShape& shape, const KvFormat& format, PagePool& pool, const ResidentIndex& index,
                             int layer)
    : shape_(shape),
      format_(format),
      pool_(&pool),
      max_pages_(index.max_pages),
      chosen_stride_(index.chosen_stride),
      tokens_(static_cast<size_t>(shape.kv_heads)),
      settled_(static_cast<size_t>(shape.kv_heads)),
      table_(static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(index.max_pages)) {
  check(pool.block_bytes() >= head_page_bytes(format, shape), "resident pages fit the pool's blocks");
  const IndexSizes sizes = index_sizes(shape, index.max_pages, index.chosen_stride, index.mirrored);
  const size_t layers = static_cast<size_t>(shape.layers);
  const size_t i = static_cast<size_t>(layer);
  std::byte* counts = index.memory + layers * sizes.table;
  std::byte* chosen = counts + layers * sizes.counts;
  device_table_ = index.mirrored ? reinterpret_cast<std::byte**>(index.memory + i * sizes.table) : nullptr;
  device_settled_ = index.mirrored ? reinterpret_cast<int*>(counts + i * sizes.counts) : nullptr;
  chosen_ = index.chosen_stride > 0 ? reinterpret_cast<int*>(chosen + i * sizes.chosen) : nullptr;
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
    settled_[head] = 0;
  }
}

void ResidentLayer::publish(Lane& lane) {
  if (device_table_ != nullptr) {
    lane.upload(reinterpret_cast<std::byte*>(device_table_), table_.data(), table_.size() * sizeof(std::byte*));
  }
}

KvView ResidentLayer::view() const {
  KvView view;
  view.format = format_;
  view.head_pages = device_table_ != nullptr ? device_table_ : const_cast<std::byte**>(table_.data());
  view.page_stride = max_pages_;
  view.tokens = device_settled_ != nullptr ? device_settled_ : settled_.data();
  return view;
}

int ResidentLayer::pages() const {
  int pages = 0;
  for (const int tokens : tokens_) {
    pages += pages_for(tokens);
  }
  return pages;
}

ResidentKv::ResidentKv(const KvShape& shape, const KvFormat& format, PagePool& pool, const ResidentIndex& index)
    : head_page_bytes_(head_page_bytes(format, shape)) {
  layers_.reserve(static_cast<size_t>(shape.layers));
  for (int i = 0; i < shape.layers; ++i) {
    layers_.emplace_back(shape, format, pool, index, i);
  }
}

void ResidentKv::settle(Lane& lane) {
  std::vector<int> counts;
  for (ResidentLayer& layer : layers_) {
    layer.settled_ = layer.tokens_;
    counts.insert(counts.end(), layer.settled_.begin(), layer.settled_.end());
  }
  if (int* device = layers_.front().device_settled_; device != nullptr) {
    lane.upload(reinterpret_cast<std::byte*>(device), counts.data(), counts.size() * sizeof(int));
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
