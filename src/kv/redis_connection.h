// RedisConnection: one connection to a Redis or Valkey server, made when it is needed and dropped at the first thing
// that is wrong with it. A reply takes no memory: bytes go where they were asked for, anything else that is long is
// refused. One thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

struct redisContext;  // hiredis's

namespace vericache {

struct RedisReply {
  int type = 0;  // REDIS_REPLY_...
  long long integer = 0;
  size_t bytes = 0;           // of a string
  std::span<std::byte> to{};  // where a string of that size goes
  std::string error{};        // what the server complains of
};

class RedisConnection {
 public:
  static constexpr std::chrono::milliseconds kPatience{5000};

  // `patience`: how long to connect, and how long a command may stand still.
  RedisConnection(std::string host, int port, std::chrono::milliseconds patience = kPatience);
  ~RedisConnection() { drop(); }
  RedisConnection(const RedisConnection&) = delete;
  RedisConnection& operator=(const RedisConnection&) = delete;

  bool connected() const { return context_ != nullptr; }
  // Connects where there is no connection; before the commands of every call. A server that kept a call waiting for a
  // second or more and then failed it is left alone for as long, so that a dead one takes half the time at most.
  bool open();

  // A command and its arguments; the last one may be long. Replies come in the order of the commands. What is false has
  // dropped the connection, and why() says why.
  using Words = std::initializer_list<std::string_view>;
  bool send(Words words);
  bool send(Words words, std::span<const std::byte> last);
  // Does not wait: false, and still connected, where the command finds no room on its way.
  bool try_send(Words words);
  int unread() const { return unread_; }        // replies that are still to come
  bool receive_integer(long long least);        // at least that
  bool receive_bytes(std::span<std::byte> to);  // exactly as many
  const std::string& why() const { return why_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool send_bytes(const void* bytes, size_t size, int flags);
  bool receive(std::span<std::byte> to);
  bool unexpected();
  bool fail(std::string why);
  bool fail_as_read();  // as hiredis says
  void drop();
  bool late(Clock::time_point since, size_t bytes) const;

  std::string host_;
  int port_;
  std::chrono::milliseconds patience_;
  redisContext* context_ = nullptr;
  RedisReply reply_;
  int unread_ = 0;
  Clock::time_point begin_{};  // of the call
  Clock::time_point again_{};  // not before that
  std::string why_;
};

}  // namespace vericache
