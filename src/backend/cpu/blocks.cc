#include "backend/cpu/blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/hash.h"

namespace vericache {
namespace {

constexpr size_t kForkBytes = size_t{64} << 10;  // less is copied before a thread has woken up
constexpr size_t kSharesPerThread = 4;

const std::byte* block_at(const BlockRow& blocks, int i) {
  return blocks.first + static_cast<size_t>(i) * blocks.stride;
}

size_t checksum_at(const BlockRow& blocks, int i) {
  return static_cast<size_t>(i) * static_cast<size_t>(blocks.checksum_stride);
}

// Bytes [begin, end) of the copies, counted as if they lay one after the other.
void copy_share(std::span<const BlockCopy> copies, size_t begin, size_t end) {
  size_t at = 0;
  for (const BlockCopy& copy : copies) {
    if (at >= end) {
      return;
    }
    const size_t first = std::clamp(begin, at, at + copy.bytes) - at;
    const size_t last = std::min(end, at + copy.bytes) - at;
    if (first < last) {
      std::memcpy(copy.target + first, copy.source + first, last - first);
    }
    at += copy.bytes;
  }
}

}  // namespace

void copy_blocks(std::span<const BlockCopy> copies, ThreadPool& pool) {
  size_t bytes = 0;
  for (const BlockCopy& copy : copies) {
    bytes += copy.bytes;
  }
  if (bytes < kForkBytes || pool.threads() == 1) {
    copy_share(copies, 0, bytes);
    return;
  }
  const size_t share = (bytes / (kSharesPerThread * static_cast<size_t>(pool.threads())) / 64 + 1) * 64;
  pool.parallel_for(static_cast<int>((bytes + share - 1) / share), [&](int i) {
    const size_t begin = static_cast<size_t>(i) * share;
    copy_share(copies, begin, std::min(bytes, begin + share));
  });
}

void checksum_blocks(const BlockRow& blocks, uint64_t* checksums, ThreadPool& pool) {
  pool.parallel_for(blocks.count,
                    [&](int i) { checksums[checksum_at(blocks, i)] = hash_bytes(block_at(blocks, i), blocks.bytes); });
}

uint32_t count_mismatches(const BlockRow& blocks, const uint64_t* checksums, ThreadPool& pool) {
  std::atomic<uint32_t> mismatches = 0;
  pool.parallel_for(blocks.count, [&](int i) {
    if (hash_bytes(block_at(blocks, i), blocks.bytes) != checksums[checksum_at(blocks, i)]) {
      mismatches.fetch_add(1, std::memory_order_relaxed);
    }
  });
  return mismatches.load();
}

}  // namespace vericache
