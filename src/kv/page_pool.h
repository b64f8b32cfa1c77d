// PagePool: equal blocks of memory, all taken at start. A full pool gives null and the caller waits.
// One thread.
#pragma once

#include <cstddef>
#include <vector>

#include "base/check.h"

namespace vericache {

class PagePool {
 public:
  // `memory` holds count blocks of block_bytes each and outlives the pool.
  PagePool(std::byte* memory, size_t block_bytes, int count)
      : memory_(memory), block_bytes_(block_bytes), count_(count) {
    free_.reserve(static_cast<size_t>(count));
    for (int i = count - 1; i >= 0; --i) {
      free_.push_back(memory + static_cast<size_t>(i) * block_bytes);
    }
  }

  std::byte* take() {
    if (free_.empty()) {
      return nullptr;
    }
    std::byte* block = free_.back();
    free_.pop_back();
    return block;
  }
  void give(std::byte* block) {
    check(block >= memory_ && block < memory_ + block_bytes_ * static_cast<size_t>(count_) &&
              static_cast<size_t>(block - memory_) % block_bytes_ == 0 && free() < count_,
          "a block returned to a pool that does not own it");
    free_.push_back(block);
  }

  const std::byte* memory() const { return memory_; }
  size_t block_bytes() const { return block_bytes_; }
  int count() const { return count_; }
  int free() const { return static_cast<int>(free_.size()); }
  int used() const { return count_ - free(); }

 private:
  std::byte* memory_;
  size_t block_bytes_;
  int count_;
  std::vector<std::byte*> free_;
};

}  // namespace vericache
