#include "kv/tail.h"

namespace vericache {

Tail::Tail(const KvShape& shape, PagePool& pool, int max_sets, Kernels& lane, std::byte* index)
    : shape_(shape),
      pool_(pool),
      max_sets_(max_sets),
      lane_(lane),
      table_(index_bytes(shape, max_sets) / sizeof(std::byte*)),
      device_table_(reinterpret_cast<std::byte**>(index)) {
  sets_.reserve(static_cast<size_t>(max_sets));
}

size_t Tail::index_bytes(const KvShape& shape, int max_sets) {
  return static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(max_sets) *
         sizeof(std::byte*);
}

bool Tail::grow(int end) {
  bool changed = false;
  while (this->end() < end) {
    std::byte* set = sets() < max_sets_ ? pool_.take() : nullptr;
    if (set == nullptr) {
      break;
    }
    // Attention multiplies masked slots by zero: what lies there must be finite.
    lane_.zero(set, pool_.block_bytes());
    sets_.push_back(set);
    changed = true;
  }
  if (changed) {
    fill_table();
  }
  return this->end() >= end;
}

void Tail::release_before(int position) {
  check(position % kPageTokens == 0 && position <= end(), "a tail gives back whole pages that it holds");
  const int sets = (position - position_) / kPageTokens;
  if (sets <= 0) {
    return;
  }
  for (int i = 0; i < sets; ++i) {
    pool_.give(sets_[static_cast<size_t>(i)]);
  }
  sets_.erase(sets_.begin(), sets_.begin() + sets);
  position_ = position;
  fill_table();
}

void Tail::release_after(int end) {
  check(end >= position_, "a tail ends behind its position");
  const auto kept = static_cast<size_t>((end - position_ + kPageTokens - 1) / kPageTokens);
  if (kept >= sets_.size()) {
    return;
  }
  for (size_t i = kept; i < sets_.size(); ++i) {
    pool_.give(sets_[i]);
  }
  sets_.resize(kept);
  fill_table();
}

void Tail::clear() {
  for (std::byte* set : sets_) {
    pool_.give(set);
  }
  sets_.clear();
  position_ = 0;
}

void Tail::fill_table() {
  const size_t head_bytes = head_page_bytes(KvFormat{}, shape_);
  for (int layer = 0; layer < shape_.layers; ++layer) {
    for (int head = 0; head < shape_.kv_heads; ++head) {
      std::byte** row = table_.data() + (static_cast<size_t>(layer) * static_cast<size_t>(shape_.kv_heads) +
                                         static_cast<size_t>(head)) *
                                            static_cast<size_t>(max_sets_);
      for (size_t i = 0; i < sets_.size(); ++i) {
        row[i] = sets_[i] + static_cast<size_t>(layer) * page_bytes(shape_) + static_cast<size_t>(head) * head_bytes;
      }
    }
  }
  if (device_table_ != nullptr) {
    lane_.upload(reinterpret_cast<std::byte*>(device_table_), table_.data(), table_.size() * sizeof(std::byte*));
  }
}

KvView Tail::view(int layer, int position) const {
  check(position >= position_ && position % kPageTokens == 0, "a tail is seen from a page border that it holds");
  KvView view;
  view.head_pages = (device_table_ != nullptr ? device_table_ : const_cast<std::byte**>(table_.data())) +
                    static_cast<size_t>(layer) * static_cast<size_t>(shape_.kv_heads) * static_cast<size_t>(max_sets_) +
                    (position - position_) / kPageTokens;
  view.page_stride = max_sets_;
  return view;
}

}  // namespace vericache
