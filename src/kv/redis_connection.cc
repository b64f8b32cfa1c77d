#include "kv/redis_connection.h"

#include <fmt/format.h>
#include <hiredis/hiredis.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace vericache {
namespace {

// What the reader may hold beyond the bytes that were asked for: the reply's frame, and replies of commands before it.
constexpr size_t kReplyRoom = size_t{1} << 16;
// A command that is never still may take this long for each MiB, beyond the patience.
constexpr std::chrono::seconds kPerMib{1};
constexpr std::chrono::seconds kSlow{1};
constexpr size_t kLongestComplaint = 200;

std::string reason(int error) {
  return std::generic_category().message(error);
}

timeval as_timeval(std::chrono::milliseconds time) {
  return {.tv_sec = time.count() / 1000, .tv_usec = time.count() % 1000 * 1000};
}

void append_bulk_head(std::string& text, size_t size) {
  text += fmt::format("${}\r\n", size);
}

// Arguments and all, but for what follows them.
std::string command_text(RedisConnection::Words words, size_t more) {
  std::string text = fmt::format("*{}\r\n", words.size() + more);
  for (const std::string_view word : words) {
    append_bulk_head(text, word.size());
    text.append(word).append("\r\n");
  }
  return text;
}

RedisReply* reply_of(const redisReadTask* task) {
  auto* reply = static_cast<RedisReply*>(task->privdata);
  reply->type = task->type;
  return reply;
}

// hiredis would make an object of every reply, and of an array's announced length at once. It fills a RedisReply
// instead; there is no command here that an array answers.
constexpr redisReplyObjectFunctions kReplyFunctions{
    .createString = [](const redisReadTask* task, char* text, size_t size) -> void* {
      RedisReply* reply = reply_of(task);
      reply->bytes = size;
      if (task->type == REDIS_REPLY_STRING && size == reply->to.size()) {
        std::copy_n(reinterpret_cast<const std::byte*>(text), size, reply->to.begin());
      } else if (task->type == REDIS_REPLY_ERROR) {
        reply->error.assign(text, std::min(size, kLongestComplaint));
      }
      return reply;
    },
    .createArray = [](const redisReadTask*, auto) -> void* { return nullptr; },
    .createInteger = [](const redisReadTask* task, long long value) -> void* {
      RedisReply* reply = reply_of(task);
      reply->integer = value;
      return reply;
    },
    .createNil = [](const redisReadTask* task) -> void* { return reply_of(task); },
    .freeObject = [](void*) {},
};

}  // namespace

RedisConnection::RedisConnection(std::string host, int port, std::chrono::milliseconds patience)
    : host_(std::move(host)), port_(port), patience_(patience) {}

bool RedisConnection::open() {
  if (Clock::now() < again_) {
    return false;
  }
  begin_ = Clock::now();
  if (context_ != nullptr) {
    return true;
  }
  context_ = redisConnectWithTimeout(host_.c_str(), port_, as_timeval(patience_));
  if (context_ == nullptr) {
    return fail("no memory for a connection");
  }
  if (context_->err != 0 || redisSetTimeout(context_, as_timeval(patience_)) != REDIS_OK) {
    return fail(fmt::format("no connection: {}", context_->errstr));
  }
  context_->reader->fn = const_cast<redisReplyObjectFunctions*>(&kReplyFunctions);  // nobody writes there
  context_->reader->privdata = &reply_;
  context_->reader->maxbuf = 0;  // keep the memory from reply to reply
  return true;
}

bool RedisConnection::send(Words words) {
  const std::string text = command_text(words, 0);
  ++unread_;
  return send_bytes(text.data(), text.size(), 0);
}

bool RedisConnection::send(Words words, std::span<const std::byte> last) {
  std::string text = command_text(words, 1);
  append_bulk_head(text, last.size());
  ++unread_;
  return send_bytes(text.data(), text.size(), MSG_MORE) && send_bytes(last.data(), last.size(), MSG_MORE) &&
         send_bytes("\r\n", 2, 0);
}

bool RedisConnection::try_send(Words words) {
  begin_ = Clock::now();
  const std::string text = command_text(words, 0);
  const ssize_t sent = ::send(context_->fd, text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent == static_cast<ssize_t>(text.size())) {
    ++unread_;
    return true;
  }
  if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    return false;
  }
  return fail(sent < 0 ? reason(errno) : "a command was cut short");
}

// Not hiredis's own way to write, which raises SIGPIPE where the server has gone and copies what it sends.
bool RedisConnection::send_bytes(const void* bytes, size_t size, int flags) {
  const Clock::time_point since = Clock::now();
  const auto* at = static_cast<const char*>(bytes);
  for (size_t left = size; left > 0;) {
    const ssize_t sent = ::send(context_->fd, at, left, MSG_NOSIGNAL | flags);
    if (sent > 0) {
      at += sent;
      left -= static_cast<size_t>(sent);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK || (errno == EINTR && late(since, size))) {
      return fail("the server takes nothing");
    } else if (errno != EINTR) {
      return fail(reason(errno));
    }
    if (left > 0 && late(since, size)) {
      return fail("the server takes too little");
    }
  }
  return true;
}

bool RedisConnection::receive_integer(long long least) {
  if (!receive({})) {
    return false;
  }
  return (reply_.type == REDIS_REPLY_INTEGER && reply_.integer >= least) || unexpected();
}

bool RedisConnection::receive_bytes(std::span<std::byte> to) {
  if (!receive(to)) {
    return false;
  }
  return (reply_.type == REDIS_REPLY_STRING && reply_.bytes == to.size()) || unexpected();
}

bool RedisConnection::receive(std::span<std::byte> to) {
  reply_ = {.to = to};
  const Clock::time_point since = Clock::now();
  for (;;) {
    void* reply = nullptr;
    if (redisGetReplyFromReader(context_, &reply) != REDIS_OK) {
      return fail_as_read();
    }
    if (reply != nullptr) {
      break;
    }
    if (context_->reader->len > to.size() + kReplyRoom) {
      return fail("the server's reply is longer than what was asked for");
    }
    if (late(since, to.size())) {
      return fail("the server's reply does not end");
    }
    if (redisBufferRead(context_) != REDIS_OK) {
      return fail_as_read();
    }
  }
  --unread_;
  if (unread_ == 0 && context_->reader->pos != context_->reader->len) {
    return fail("the server says more than it was asked");
  }
  return true;
}

// A reply in order, but not the one that the command has.
bool RedisConnection::unexpected() {
  switch (reply_.type) {
    case REDIS_REPLY_ERROR:
      return fail("the server says: " + reply_.error);
    case REDIS_REPLY_STRING:
      return fail(fmt::format("the server has {} of {} bytes", reply_.bytes, reply_.to.size()));
    default:
      return fail("the server's reply is not one to the command");
  }
}

bool RedisConnection::fail_as_read() {
  if (context_->err == REDIS_ERR_IO && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    return fail("the server does not answer");
  }
  if (context_->err == REDIS_ERR_OOM) {
    return fail("the server's reply is not one to the command");  // an array, see above
  }
  return fail(context_->errstr);
}

bool RedisConnection::fail(std::string why) {
  why_ = std::move(why);
  drop();
  const Clock::time_point now = Clock::now();
  again_ = now - begin_ >= kSlow ? now + (now - begin_) : now;
  return false;
}

void RedisConnection::drop() {
  if (context_ != nullptr) {
    redisFree(context_);
    context_ = nullptr;
  }
  unread_ = 0;
}

bool RedisConnection::late(Clock::time_point since, size_t bytes) const {
  return Clock::now() - since > patience_ + kPerMib * (bytes >> 20);
}

}  // namespace vericache
