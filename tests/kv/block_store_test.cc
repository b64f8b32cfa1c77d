#include "kv/block_store.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <thread>

#include "base/error.h"
#include "kv/redis_connection.h"
#include "kv/redis_store.h"
#include "redis_servers.h"

namespace vericache {
namespace {

using test::FakeServer;
using test::RedisServer;
using Clock = std::chrono::steady_clock;

constexpr size_t kBlockBytes = 20000;

std::vector<std::byte> random_bytes(size_t size, std::mt19937_64& random) {
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  return bytes;
}

std::string temporary_directory() {
  return std::filesystem::temp_directory_path().string();
}

std::unique_ptr<BlockStore> disk_store(int blocks, size_t block_bytes = kBlockBytes) {
  return make_block_store({.kind = BlockStoreSpec::Kind::disk, .place = temporary_directory()}, block_bytes, blocks);
}
std::unique_ptr<BlockStore> redis_store(int port, int blocks, size_t block_bytes = kBlockBytes) {
  return make_block_store({.kind = BlockStoreSpec::Kind::redis, .place = "127.0.0.1:" + std::to_string(port)},
                          block_bytes, blocks);
}

// The message of the Error that `call` throws.
std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}
#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(BlockStoreSpec, SaysWhereAndHowMuch) {
  const BlockStoreSpec disk = parse_block_store("disk:/some/dir,with comma,size=64G");
  EXPECT_EQ(disk.kind, BlockStoreSpec::Kind::disk);
  EXPECT_EQ(disk.place, "/some/dir,with comma");
  EXPECT_EQ(disk.bytes, 64'000'000'000u);
  const BlockStoreSpec redis = parse_block_store("redis:cache.local:6379,size=512Mi");
  EXPECT_EQ(redis.kind, BlockStoreSpec::Kind::redis);
  EXPECT_EQ(redis.place, "cache.local:6379");
  EXPECT_EQ(redis.bytes, size_t{512} << 20);
  EXPECT_EQ(parse_block_store("redis:[::1]:1,size=1K").place, "[::1]:1");
  EXPECT_EQ(parse_redis_address("[fe80::2]:65535").host, "fe80::2");
  EXPECT_EQ(parse_redis_address("[fe80::2]:65535").port, 65535);
}

TEST(BlockStoreSpec, IsRefusedWithTheRemedy) {
  for (const char* spec : {"",
                           "disk",
                           "disk:",
                           "disk:/a",
                           "disk:,size=1G",
                           "disk:/a,size=",
                           "disk:/a,size=0",
                           "disk:/a,size=auto",
                           "disk:/a,size=-1",
                           "disk:/a,size=1Q",
                           "disk:/a,size=1G,x=2",
                           "disk:/a,bytes=1G",
                           "tape:/a,size=1G",
                           "redis:",
                           "redis:host,size=1G",
                           "redis:host:,size=1G",
                           "redis:host:0,size=1G",
                           "redis:host:65536,size=1G",
                           "redis:host:6379x,size=1G",
                           "redis::6379,size=1G",
                           "redis:::1:6379,size=1G",
                           "redis:[]:6379,size=1G",
                           "redis:host:6379",
                           "redis:host:99999999999,size=1G",
                           "Disk:/a,size=1G"}) {
    EXPECT_THROW(parse_block_store(spec), UsageError) << spec;
  }
  EXPECT_SAYS(error_of([] { parse_block_store("tape:/a,size=1G"); }), "disk:DIR,size=64G or redis:HOST:PORT,size=64G");
  EXPECT_SAYS(error_of([] { parse_block_store("redis:::1:6379,size=1G"); }), "[::1]:6379");
}

// One of each kind that there is here; the server lives as long as its stores.
class EveryStore : public testing::TestWithParam<BlockStoreSpec::Kind> {
 protected:
  void SetUp() override {
    if (GetParam() == BlockStoreSpec::Kind::redis) {
      const auto program = RedisServer::program();
      if (!program) {
        GTEST_SKIP() << "no redis-server here: tools/install_packages.sh installs one (redis-tools)";
      }
      server_ = std::make_unique<RedisServer>(*program);
      ASSERT_TRUE(server_->start());
    }
  }
  std::unique_ptr<BlockStore> make(int blocks, size_t block_bytes = kBlockBytes) {
    return server_ ? redis_store(server_->port(), blocks, block_bytes) : disk_store(blocks, block_bytes);
  }

  std::unique_ptr<RedisServer> server_;
};

INSTANTIATE_TEST_SUITE_P(Stores, EveryStore, testing::Values(BlockStoreSpec::Kind::disk, BlockStoreSpec::Kind::redis),
                         [](const auto& kind) { return kind.param == BlockStoreSpec::Kind::disk ? "Disk" : "Redis"; });

TEST_P(EveryStore, GivesOutWhatItHas) {
  const auto store = make(3);
  EXPECT_EQ(store->block_bytes(), kBlockBytes);
  EXPECT_EQ(store->count(), 3);
  EXPECT_EQ(store->free(), 3);
  std::vector<bool> taken(3);
  for (int i = 0; i < 3; ++i) {
    taken[static_cast<size_t>(store->take())] = true;
  }
  EXPECT_EQ(taken, std::vector<bool>(3, true));
  EXPECT_EQ(store->take(), -1);
  store->give(1);
  EXPECT_EQ(store->free(), 1);
  EXPECT_EQ(store->take(), 1);
  EXPECT_EQ(make(0)->take(), -1);
}

TEST_P(EveryStore, ReadsWhatWasWritten) {
  constexpr int kBlocks = 5;
  std::mt19937_64 random(3);
  const auto store = make(kBlocks);
  struct Model {
    std::vector<std::byte> bytes = std::vector<std::byte>(kBlockBytes);
    size_t end = 0;
  };
  std::vector<Model> model(kBlocks);
  std::vector<int> taken;
  for (int step = 0; step < 3000; ++step) {
    const uint64_t dice = random() % 20;
    if (taken.empty() || (dice == 0 && store->free() > 0)) {
      taken.push_back(store->take());
      model[static_cast<size_t>(taken.back())] = {};
      continue;
    }
    const size_t which = random() % taken.size();
    const int block = taken[which];
    Model& expected = model[static_cast<size_t>(block)];
    if (dice == 1) {
      store->give(block);
      taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(which));
    } else if (dice < 10) {  // no gaps: they hold anything
      const size_t offset = random() % (expected.end + 1);
      const auto bytes = random_bytes(random() % std::min<size_t>(kBlockBytes - offset + 1, 3000), random);
      ASSERT_TRUE(store->write(block, offset, bytes));
      std::copy(bytes.begin(), bytes.end(), expected.bytes.begin() + static_cast<std::ptrdiff_t>(offset));
      expected.end = std::max(expected.end, offset + bytes.size());
    } else {
      const size_t offset = random() % (kBlockBytes + 1);
      std::vector<std::byte> back(random() % (kBlockBytes - offset + 1));
      const bool there = store->read(block, offset, back);
      ASSERT_EQ(there, offset + back.size() <= expected.end) << offset << " " << back.size() << " " << expected.end;
      if (there) {
        ASSERT_TRUE(std::equal(back.begin(), back.end(), expected.bytes.begin() + static_cast<std::ptrdiff_t>(offset)));
      }
    }
  }
}

TEST_P(EveryStore, SaysNothingThatWasNotWrittenSinceItWasTaken) {
  const auto store = make(1);
  const int block = store->take();
  std::byte byte{};
  EXPECT_FALSE(store->read(block, 0, {&byte, 1}));
  const std::vector<std::byte> bytes(kBlockBytes, std::byte{7});
  ASSERT_TRUE(store->write(block, 0, bytes));
  EXPECT_TRUE(store->read(block, kBlockBytes - 1, {&byte, 1}));
  EXPECT_EQ(byte, std::byte{7});
  store->give(block);
  ASSERT_EQ(store->take(), block);
  EXPECT_FALSE(store->read(block, 0, {&byte, 1}));
  ASSERT_TRUE(store->write(block, 0, {&byte, 1}));
  EXPECT_TRUE(store->read(block, 0, {&byte, 1}));
  EXPECT_FALSE(store->read(block, 1, {&byte, 1}));
}

TEST_P(EveryStore, OneThreadReadsWhileAnotherWrites) {
  constexpr int kBlocks = 24;
  constexpr size_t kBytes = 300'000;
  std::mt19937_64 random(5);
  const auto bytes = random_bytes(kBytes, random);
  const auto store = make(kBlocks, kBytes);
  for (int i = 0; i < kBlocks; ++i) {
    ASSERT_GE(store->take(), 0);
  }
  std::atomic<int> written = 0;
  std::thread writer([&] {
    for (int block = 0; block < kBlocks; ++block) {
      EXPECT_TRUE(store->write(block, 0, bytes));
      written.store(block + 1, std::memory_order_release);
    }
  });
  std::vector<std::byte> back(kBytes);
  for (int reads = 0; reads < 2 * kBlocks || written.load() < kBlocks; ++reads) {
    const int known = written.load(std::memory_order_acquire);
    if (known > 0) {
      ASSERT_TRUE(store->read(reads % known, 0, back));
      ASSERT_EQ(back, bytes);
    }
  }
  writer.join();
}

TEST(DiskStore, LeavesNoNameAndGivesRoomBack) {
  std::string folder = temporary_directory() + "/vericache-store-XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  constexpr size_t kBytes = size_t{1} << 20;
  const auto store = make_block_store({.kind = BlockStoreSpec::Kind::disk, .place = folder}, kBytes, 4);
  EXPECT_EQ(store->name(), "disk " + folder);
  EXPECT_TRUE(std::filesystem::is_empty(folder));
  std::filesystem::remove(folder);
  const int block = store->take();
  const std::vector<std::byte> bytes(kBytes, std::byte{1});
  EXPECT_TRUE(store->write(block, 0, bytes)) << "the file needs no folder";
  store->give(block);
}

TEST(DiskStore, SaysWhyItCannotBe) {
  const auto make = [](const std::string& place, size_t block_bytes, int blocks) {
    return error_of(
        [&] { make_block_store({.kind = BlockStoreSpec::Kind::disk, .place = place}, block_bytes, blocks); });
  };
  EXPECT_SAYS(make(temporary_directory() + "/no such", 1, 1), "name a directory that exists and can be written");
  EXPECT_SAYS(make("/dev/null", 1, 1), "/dev/null");
  EXPECT_SAYS(make(temporary_directory(), size_t{1} << 40, 100'000), "give a smaller size");
  EXPECT_SAYS(make(temporary_directory(), size_t{1} << 62, 100'000), "more than a file holds");
}

TEST(DiskStore, ADeviceThatFillsUpIsAFailure) {
  const auto store = disk_store(2, 1 << 16);
  const int block = store->take();
  const std::vector<std::byte> bytes(1 << 16, std::byte{1});
  // What a full disk does to a file, a limit on its size does too: short writes, then an error.
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  ASSERT_NE(std::signal(SIGXFSZ, SIG_IGN), SIG_ERR);
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(block) * bytes.size() + 1000;
  setrlimit(RLIMIT_FSIZE, &tight);
  testing::internal::CaptureStderr();
  const bool first = store->write(block, 0, bytes);
  const bool second = store->write(block, 0, bytes);
  const std::string said = testing::internal::GetCapturedStderr();
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_DFL);
  EXPECT_FALSE(first);
  EXPECT_FALSE(second);
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  EXPECT_SAYS(said, "writing failed: File too large");
  std::byte byte{};
  EXPECT_FALSE(store->read(block, 0, {&byte, 1}));
  EXPECT_TRUE(store->write(block, 0, bytes));
  EXPECT_TRUE(store->read(block, 0, {&byte, 1}));
}

class RealRedis : public testing::Test {
 protected:
  void SetUp() override {
    const auto program = RedisServer::program();
    if (!program) {
      GTEST_SKIP() << "no redis-server here: tools/install_packages.sh installs one (redis-tools)";
    }
    server_ = std::make_unique<RedisServer>(*program);
    ASSERT_TRUE(server_->start());
  }
  std::unique_ptr<RedisServer> server_;
};

TEST_F(RealRedis, KeysGoWithTheirBlocksAndWithTheStore) {
  auto store = redis_store(server_->port(), 300);
  EXPECT_EQ(store->name(), "redis 127.0.0.1:" + std::to_string(server_->port()));
  EXPECT_EQ(server_->ask("DBSIZE"), ":0\r\n") << "the probe is gone";
  const std::vector<std::byte> bytes(100, std::byte{1});
  for (int i = 0; i < 300; ++i) {
    ASSERT_TRUE(store->write(store->take(), 0, bytes));
  }
  EXPECT_EQ(server_->ask("DBSIZE"), ":300\r\n");
  EXPECT_EQ(server_->ask("TTL " + dynamic_cast<RedisStore&>(*store).key(7)).substr(0, 3), ":86");
  for (int i = 0; i < 290; ++i) {
    store->give(i);
  }
  // Nobody waited for the server: it is at the latest done before the next write is.
  ASSERT_EQ(store->take(), 289);
  ASSERT_TRUE(store->write(289, 0, bytes));
  EXPECT_EQ(server_->ask("DBSIZE"), ":11\r\n");
  std::vector<std::byte> back(100);
  EXPECT_TRUE(store->read(289, 0, back));
  const auto other = redis_store(server_->port(), 1);
  ASSERT_TRUE(other->write(other->take(), 0, bytes));
  store.reset();
  EXPECT_EQ(server_->ask("DBSIZE"), ":1\r\n") << "keys of another store stay";
}

TEST_F(RealRedis, AServerThatDiesIsAFailureUntilItIsBack) {
  const auto store = redis_store(server_->port(), 4);
  const std::vector<std::byte> bytes(kBlockBytes, std::byte{3});
  std::vector<std::byte> back(kBlockBytes);
  const int block = store->take();
  const int other = store->take();
  ASSERT_TRUE(store->write(block, 0, bytes));
  ASSERT_TRUE(store->write(other, 0, bytes));
  const int more[] = {store->take(), store->take()};
  ASSERT_TRUE(store->write(more[0], 0, bytes));
  ASSERT_TRUE(store->write(more[1], 0, bytes));
  server_->kill();
  testing::internal::CaptureStderr();
  store->give(more[0]);  // their keys cannot go now
  store->give(more[1]);
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(store->read(block, 0, back));
    EXPECT_FALSE(store->write(block, 0, bytes));
  }
  store->give(other);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 2) << said;
  EXPECT_SAYS(said, "reading failed");
  EXPECT_SAYS(said, "writing failed");

  ASSERT_TRUE(server_->start());
  testing::internal::CaptureStderr();
  EXPECT_FALSE(store->read(block, 0, back)) << "it has forgotten";
  testing::internal::GetCapturedStderr();
  const std::string key = dynamic_cast<RedisStore&>(*store).key(other);
  ASSERT_EQ(server_->ask("SET " + key + " left"), "+OK\r\n");
  EXPECT_TRUE(store->write(block, 0, bytes));
  EXPECT_EQ(server_->ask("EXISTS " + key), ":0\r\n") << "keys of blocks that were given back go first";
  EXPECT_TRUE(store->read(block, 0, back));
  EXPECT_EQ(back, bytes);
  ASSERT_EQ(store->take(), other);
  EXPECT_TRUE(store->write(other, 0, bytes));
  EXPECT_TRUE(store->read(other, 0, back));
}

TEST_F(RealRedis, KilledUnderLoadItTakesNobodyAlong) {
  const auto store = redis_store(server_->port(), 2, 500'000);
  const std::vector<std::byte> bytes(500'000, std::byte{3});
  ASSERT_TRUE(store->write(store->take(), 0, bytes));
  ASSERT_EQ(store->take(), 1);
  std::atomic<bool> stop = false;
  testing::internal::CaptureStderr();
  std::thread writer([&] {
    while (!stop) {
      store->write(1, 0, bytes);
    }
  });
  std::thread reader([&] {
    std::vector<std::byte> back(bytes.size());
    while (!stop) {
      if (store->read(0, 0, back)) {
        EXPECT_EQ(back, bytes);
      }
    }
  });
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    server_->kill();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_TRUE(server_->start());
  }
  stop = true;
  writer.join();
  reader.join();
  testing::internal::GetCapturedStderr();
  EXPECT_TRUE(store->write(1, 0, bytes));
}

TEST_F(RealRedis, AServerThatRefusesSaysWhy) {
  const std::string place = "127.0.0.1:" + std::to_string(server_->port());
  const auto make = [&](const std::string& where, size_t block_bytes = 10) {
    return error_of([&] { make_block_store({.kind = BlockStoreSpec::Kind::redis, .place = where}, block_bytes, 1); });
  };
  EXPECT_SAYS(make(place, size_t{1} << 30), "use disk:DIR");
  const auto store = redis_store(server_->port(), 1);
  ASSERT_EQ(server_->ask("CONFIG SET maxmemory 1"), "+OK\r\n");
  EXPECT_SAYS(make(place), "OOM command not allowed");
  testing::internal::CaptureStderr();
  const std::vector<std::byte> bytes(100);
  EXPECT_FALSE(store->write(store->take(), 0, bytes));
  EXPECT_SAYS(testing::internal::GetCapturedStderr(), "maxmemory");
  ASSERT_EQ(server_->ask("CONFIG SET maxmemory 0"), "+OK\r\n");
  EXPECT_TRUE(store->write(0, 0, bytes));
  ASSERT_EQ(server_->ask("CONFIG SET requirepass secret"), "+OK\r\n");
  EXPECT_SAYS(make(place), "NOAUTH");
  EXPECT_SAYS(make("127.0.0.1:" + std::to_string(test::free_port())), "Connection refused");
}

bool say(int connection, std::string_view text) {
  return ::send(connection, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
}

TEST(HostileServer, WhateverItAnswersIsAFailureAndNoMore) {
  FakeServer server;
  const auto store = redis_store(server.port(), 1, 4096);
  const std::vector<std::byte> bytes(4096, std::byte{'x'});
  ASSERT_TRUE(store->write(store->take(), 0, bytes));
  std::byte byte{};
  std::string nested;
  for (int i = 0; i < 20; ++i) {
    nested += "*1\r\n";
  }
  const std::string answers[] = {":1\r\n",
                                 "+OK\r\n",
                                 "-ERR go away\r\n",
                                 "$-1\r\n",
                                 "$0\r\n\r\n",
                                 "$2\r\nab\r\n",
                                 "*2147483647\r\n",
                                 "*0\r\n",
                                 "*-1\r\n",
                                 "*1\r\n$1\r\na\r\n",
                                 nested,
                                 "garbage\r\n",
                                 "$x\r\n",
                                 "$99999999999999999999\r\n",
                                 "$-5\r\n",
                                 ":12x\r\n",
                                 "\r\n",
                                 std::string("\0\0\0\0", 4),
                                 "$1\r\n*\r\n:1\r\n",
                                 "-" + std::string(50'000, 'e') + "\r\n"};
  testing::internal::CaptureStderr();
  for (const std::string& answer : answers) {
    server.set_hostile([answer](int connection) { return !say(connection, answer); });
    EXPECT_FALSE(store->read(0, 0, {&byte, 1})) << answer;
  }
  server.set_hostile([](int) { return true; });
  EXPECT_FALSE(store->read(0, 0, {&byte, 1})) << "it hung up";
  server.set_hostile([](int connection) { return say(connection, "$1\r\n"); });
  EXPECT_FALSE(store->read(0, 0, {&byte, 1})) << "it hung up in the middle";
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  server.set_hostile(nullptr);
  EXPECT_TRUE(store->read(0, 0, {&byte, 1}));
  EXPECT_EQ(byte, std::byte{'*'});
}

TEST(HostileServer, WhatNeverEndsIsCutOff) {
  FakeServer server;
  const auto store = redis_store(server.port(), 1, 4096);
  const std::vector<std::byte> bytes(4096, std::byte{'x'});
  ASSERT_TRUE(store->write(store->take(), 0, bytes));
  std::byte byte{};
  testing::internal::CaptureStderr();
  for (const char* start : {"$9223372036854775807\r\n", "$2000000000\r\n", "+", "-", ":", "*", "$"}) {
    std::atomic<size_t> sent = 0;
    std::atomic<bool> over = false;
    server.set_hostile([&](int connection) {
      const std::string flood(65536, '1');
      say(connection, start);
      while (sent < size_t{1} << 30 && say(connection, flood)) {
        sent += flood.size();
      }
      over = true;
      return true;
    });
    EXPECT_FALSE(store->read(0, 0, {&byte, 1})) << start;
    while (!over) {
      std::this_thread::yield();
    }
    EXPECT_LT(sent, size_t{64} << 20) << "the sockets' buffers, and what the store took";
  }
  testing::internal::GetCapturedStderr();
}

TEST(HostileServer, SilenceEndsThePatience) {
  FakeServer server;
  server.set_hostile([](int) { return false; });
  RedisConnection connection("127.0.0.1", server.port(), std::chrono::milliseconds(100));
  std::byte byte{};
  const Clock::time_point since = Clock::now();
  ASSERT_TRUE(connection.open());
  ASSERT_TRUE(connection.send({"GETRANGE", "key", "0", "0"}));
  EXPECT_FALSE(connection.receive_bytes({&byte, 1}));
  EXPECT_LT(Clock::now() - since, std::chrono::seconds(2));
  EXPECT_FALSE(connection.connected());
  EXPECT_EQ(connection.why(), "the server does not answer");
  // A byte now and then is no reply either.
  server.set_hostile([](int to) {
    say(to, "+");
    while (say(to, "1")) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return true;
  });
  ASSERT_TRUE(connection.open());
  ASSERT_TRUE(connection.send({"GETRANGE", "key", "0", "0"}));
  EXPECT_FALSE(connection.receive_bytes({&byte, 1}));
  EXPECT_EQ(connection.why(), "the server's reply does not end");
  EXPECT_LT(Clock::now() - since, std::chrono::seconds(2));
}

}  // namespace
}  // namespace vericache
