#include "kv/block_store.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "base/parse_bytes.h"
#include "kv/disk_store.h"
#include "kv/redis_store.h"

namespace vericache {
namespace {

constexpr std::string_view kForms = "write disk:DIR,size=64G or redis:HOST:PORT,size=64G";

}  // namespace

BlockStoreSpec parse_block_store(std::string_view spec) {
  BlockStoreSpec result;
  std::string_view rest = spec;
  if (rest.starts_with("disk:")) {
    result.kind = BlockStoreSpec::Kind::disk;
    rest.remove_prefix(5);
  } else if (rest.starts_with("redis:")) {
    result.kind = BlockStoreSpec::Kind::redis;
    rest.remove_prefix(6);
  } else {
    throw UsageError("block store '{}' is of no known kind; {}", spec, kForms);
  }
  // A directory's name may hold commas: the size stands behind the last one.
  constexpr std::string_view kSize = ",size=";
  const size_t mark = rest.rfind(',');
  if (mark == std::string_view::npos || !rest.substr(mark).starts_with(kSize)) {
    throw UsageError("block store '{}' does not end with its size; {}", spec, kForms);
  }
  result.place = rest.substr(0, mark);
  if (result.place.empty()) {
    throw UsageError("block store '{}' names no place; {}", spec, kForms);
  }
  if (result.kind == BlockStoreSpec::Kind::redis) {
    parse_redis_address(result.place);
  }
  result.bytes = parse_bytes(rest.substr(mark + kSize.size()), "block store: size");
  if (result.bytes == 0) {
    throw UsageError("block store '{}' leaves its size open; say how much it may hold: {}", spec, kForms);
  }
  return result;
}

BlockStore::BlockStore(size_t block_bytes, int blocks)
    : block_bytes_(block_bytes), ends_(static_cast<size_t>(blocks)), taken_(static_cast<size_t>(blocks)) {
  check(block_bytes > 0 && blocks >= 0, "a block store of blocks that hold nothing");
  free_.reserve(static_cast<size_t>(blocks));
  for (int block = blocks - 1; block >= 0; --block) {
    free_.push_back(block);
  }
}

int BlockStore::take() {
  if (free_.empty()) {
    return -1;
  }
  const int block = free_.back();
  free_.pop_back();
  taken_[static_cast<size_t>(block)] = true;
  return block;
}

void BlockStore::give(int block) {
  check(block >= 0 && block < count() && taken_[static_cast<size_t>(block)],
        "a block returned to a store that it was not taken from");
  taken_[static_cast<size_t>(block)] = false;
  ends_[static_cast<size_t>(block)].store(0, std::memory_order_release);
  forget(block);
  free_.push_back(block);
}

void BlockStore::check_place(int block, size_t offset, size_t size) const {
  check(block >= 0 && block < count() && offset <= block_bytes_ && size <= block_bytes_ - offset,
        "bytes beyond a block of the store");
}

bool BlockStore::holds(int block, size_t end) const {
  return end <= ends_[static_cast<size_t>(block)].load(std::memory_order_acquire);
}

void BlockStore::wrote(int block, size_t end) {
  std::atomic<size_t>& known = ends_[static_cast<size_t>(block)];
  known.store(std::max(known.load(std::memory_order_relaxed), end), std::memory_order_release);
}

std::unique_ptr<BlockStore> make_block_store(const BlockStoreSpec& spec, size_t block_bytes, int blocks) {
  if (spec.kind == BlockStoreSpec::Kind::redis) {
    return std::make_unique<RedisStore>(spec.place, block_bytes, blocks);
  }
  return std::make_unique<DiskStore>(spec.place, block_bytes, blocks);
}

}  // namespace vericache
