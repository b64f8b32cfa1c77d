// RedisStore: blocks as strings on a Redis or Valkey server, keys `vericache:<id of the store>:<block>`.
// As BlockStore says: a connection for reads and one for writes, each with a lock of its own.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "kv/block_store.h"
#include "kv/failure_run.h"
#include "kv/redis_connection.h"

namespace vericache {

struct RedisAddress {
  std::string host;
  int port = 0;
};
// "HOST:PORT", "[::1]:6379". UsageError.
RedisAddress parse_redis_address(std::string_view place);

// The keys go with the store; those of a process that was killed go a day after they were last written (EXPIRE rides
// with every write). After a failure the next call connects anew.
class RedisStore final : public BlockStore {
 public:
  RedisStore(const std::string& place, size_t block_bytes, int blocks);  // Error
  ~RedisStore() override;

  std::string_view name() const override { return name_; }
  bool read(int block, size_t offset, std::span<std::byte> to) override;
  bool write(int block, size_t offset, std::span<const std::byte> from) override;
  std::string key(int block) const;

 private:
  RedisStore(const RedisAddress& address, const std::string& place, size_t block_bytes, int blocks);

  void forget(int block) override;
  bool fetch(const std::string& key, size_t offset, std::span<std::byte> to);
  bool put(const std::string& key, size_t offset, std::span<const std::byte> from);
  bool unlink_given(bool wait);
  void probe();

  std::string name_;
  std::string prefix_;
  std::vector<std::atomic<bool>> touched_;  // by block: whether the server was ever sent anything of it

  std::mutex reader_mutex_;
  RedisConnection reader_;
  FailureRun reading_;

  std::mutex writer_mutex_;
  RedisConnection writer_;
  FailureRun writing_;

  // Blocks whose keys are still to go. Before anything else is written they go: a block may have been taken again.
  std::mutex given_mutex_;
  std::vector<int> given_;
};

}  // namespace vericache
