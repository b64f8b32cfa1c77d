// BlockStore: blocks of equal size outside the host's memory, in a file or in a remote store. They hold sequences' full
// KV in the encoded form in which it crosses the wire.
// take and give on the engine's thread; one thread may read while another writes, and both wait for the store.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vericache {

// Where blocks are kept, as a user says it: "disk:DIR,size=64G" (a file of its own in that directory, which goes with
// the store) or "redis:HOST:PORT,size=64G" (Redis or Valkey, version 4 or newer, that asks for no password; keys of its
// own, which go with the store).
struct BlockStoreSpec {
  enum class Kind { disk, redis };
  Kind kind = Kind::disk;
  std::string place;  // DIR, or HOST:PORT; an IPv6 address stands in brackets
  size_t bytes = 0;
};
// UsageError naming what is wrong and what would be right.
BlockStoreSpec parse_block_store(std::string_view spec);

class BlockStore {
 public:
  virtual ~BlockStore() = default;
  BlockStore(const BlockStore&) = delete;
  BlockStore& operator=(const BlockStore&) = delete;

  virtual std::string_view name() const = 0;  // for messages: "disk /some/dir", "redis host:port"
  size_t block_bytes() const { return block_bytes_; }
  int count() const { return static_cast<int>(ends_.size()); }
  int free() const { return static_cast<int>(free_.size()); }

  int take();  // -1 if there is none free; engine's thread
  // Engine's thread, when nobody reads or writes the block any more. A block that is given back says nothing: taken
  // again, it is one that was never written. Does not wait for a server.
  void give(int block);

  // Bytes [offset, offset + size) of a block that is taken. Any two threads at once (one reads, one writes); blocking.
  // false: the store failed (I/O error, connection lost, short read); then `to` holds anything, and after a write so do
  // the bytes of the block. Bytes behind the last that was written since the block was taken read as false; a gap that
  // was left before it holds anything. A store may forget (a server that was started again): what comes back is proved
  // elsewhere, and what is missing is recomputed. Never throws, never ends the process; a run of failures is reported
  // on stderr once, when it begins.
  virtual bool read(int block, size_t offset, std::span<std::byte> to) = 0;
  virtual bool write(int block, size_t offset, std::span<const std::byte> from) = 0;

 protected:
  BlockStore(size_t block_bytes, int blocks);

  // check() that the bytes lie within a block.
  void check_place(int block, size_t offset, size_t size) const;
  // Whether the bytes before `end` may be there.
  bool holds(int block, size_t end) const;
  // The bytes before `end` are there: a write is over.
  void wrote(int block, size_t end);

 private:
  // The block was given back: its memory may go. Does not wait for long.
  virtual void forget(int block) = 0;

  size_t block_bytes_;
  std::vector<std::atomic<size_t>> ends_;  // by block: behind the last byte written since it was taken
  std::vector<bool> taken_;
  std::vector<int> free_;
};

// Error if the directory cannot be written or has less room than `blocks` take, or if the server cannot be reached or
// does not keep what it is given. What a server has room for only it knows: that is not asked.
std::unique_ptr<BlockStore> make_block_store(const BlockStoreSpec& spec, size_t block_bytes, int blocks);

}  // namespace vericache
