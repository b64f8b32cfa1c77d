// Tail: KV of the tokens not yet folded, bf16, in device memory. The partly filled last page always lives here. One
// thread, but pages on their way out are read by the wire until it says so.
#pragma once

#include <vector>

#include "backend/kernels.h"
#include "backend/kv_view.h"
#include "kv/page_pool.h"

namespace vericache {

// Blocks of the tail's pool are page sets: the page of every layer for the same 64 tokens, layer by layer.
inline size_t page_set_bytes(const KvShape& shape) {
  return page_bytes(shape) * static_cast<size_t>(shape.layers);
}

class Tail {
 public:
  // `lane` is the one that every user of the tail follows: what changes the tail is enqueued there. Work of an earlier
  // owner of a page set that is still under way on it comes before the set is cleared for its new owner. `index` is
  // index_bytes(...) of device memory; null where the device reads the host's own tables.
  Tail(const KvShape& shape, PagePool& pool, int max_sets, Kernels& lane, std::byte* index);
  ~Tail() { clear(); }
  Tail(const Tail&) = delete;
  Tail& operator=(const Tail&) = delete;
  static size_t index_bytes(const KvShape& shape, int max_sets);

  int position() const { return position_; }  // of its first slot, a multiple of 64
  int end() const { return position_ + sets() * kPageTokens; }
  int sets() const { return static_cast<int>(sets_.size()); }

  // Makes room for tokens up to `end`. false: the pool is empty or max_sets is reached; what was taken stays.
  bool grow(int end);
  // Gives back the sets before `position` (a multiple of 64).
  void release_before(int position);
  // Gives back the sets that hold nothing before `end`.
  void release_after(int end);
  void clear();  // empty again, at position 0

  // The page set of tokens [64 page, 64 page + 64): it stays where it is until it is given back.
  std::byte* set(int page) const { return sets_[static_cast<size_t>(page - position_ / kPageTokens)]; }
  // From `position` (>= this->position(), a multiple of 64) on, for work that follows on the lane. Valid until sets are
  // given back.
  KvView view(int layer, int position) const;

 private:
  void fill_table();

  KvShape shape_;
  PagePool& pool_;
  int max_sets_;
  Kernels& lane_;
  int position_ = 0;
  std::vector<std::byte*> sets_;
  std::vector<std::byte*> table_;  // (layers, kv_heads, max_sets)
  std::byte** device_table_;       // the same in device memory, null where that reads table_
};

}  // namespace vericache
