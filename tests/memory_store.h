// MemoryStore: a block store in memory that fails now and then.
// As BlockStore says.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <span>
#include <string_view>

#include "kv/block_store.h"

namespace vericache::test {

class MemoryStore final : public BlockStore {
 public:
  // reads: the number of reads is left there at the end, if wanted.
  MemoryStore(size_t block_bytes, int count, uint64_t reads_that_fail = 0, uint64_t* reads = nullptr)
      : BlockStore(block_bytes, count),
        memory_(block_bytes * static_cast<size_t>(count), std::byte{0xa5}),
        reads_at_the_end_(reads),
        failing_reads_(reads_that_fail) {}
  ~MemoryStore() override {
    if (reads_at_the_end_ != nullptr) {
      *reads_at_the_end_ = reads_;
    }
  }
  MemoryStore(const MemoryStore&) = delete;
  MemoryStore& operator=(const MemoryStore&) = delete;
  std::string_view name() const override { return "memory"; }
  // Every n-th read, or write; 0: none.
  void fail_reads(uint64_t every) { failing_reads_ = every; }
  void fail_writes(uint64_t every) { failing_writes_ = every; }

  bool read(int block, size_t offset, std::span<std::byte> to) override {
    if (fails(++reads_, failing_reads_)) {
      std::fill(to.begin(), to.end(), std::byte{0x5c});
      return false;
    }
    std::copy_n(at(block, offset), to.size(), to.begin());
    return true;
  }
  bool write(int block, size_t offset, std::span<const std::byte> from) override {
    if (fails(++writes_, failing_writes_)) {
      return false;
    }
    std::copy(from.begin(), from.end(), at(block, offset));
    return true;
  }

 private:
  void forget(int /*block*/) override {}
  static bool fails(uint64_t count, uint64_t every) { return every != 0 && count % every == 0; }
  std::byte* at(int block, size_t offset) {
    return memory_.data() + static_cast<size_t>(block) * block_bytes() + offset;
  }

  std::vector<std::byte> memory_;
  uint64_t* reads_at_the_end_;
  std::atomic<uint64_t> reads_ = 0;
  std::atomic<uint64_t> writes_ = 0;
  std::atomic<uint64_t> failing_reads_ = 0;
  std::atomic<uint64_t> failing_writes_ = 0;
};

}  // namespace vericache::test
