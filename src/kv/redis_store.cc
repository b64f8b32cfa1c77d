#include "kv/redis_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <random>
#include <utility>

#include "base/error.h"

namespace vericache {
namespace {

constexpr std::string_view kKeepSeconds = "86400";
// A string of Redis is no longer than that, unless its configuration says so.
constexpr size_t kMostBlockBytes = size_t{512} << 20;

// Of one store among all that share the server.
std::string make_prefix() {
  std::random_device random;
  return fmt::format("vericache:{:08x}{:08x}{:08x}:", random(), random(), random());
}

}  // namespace

RedisAddress parse_redis_address(std::string_view place) {
  const size_t mark = place.rfind(':');
  std::string_view host = place.substr(0, std::min(mark, place.size()));
  const std::string_view digits = mark == std::string_view::npos ? "" : place.substr(mark + 1);
  if (host.starts_with('[') && host.ends_with(']')) {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    throw UsageError("block store: '{}' is no HOST:PORT; write an IPv6 address in brackets, as in [::1]:6379", place);
  }
  int port = 0;
  const auto [rest, failure] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  if (host.empty() || failure != std::errc{} || rest != digits.data() + digits.size() || port < 1 || port > 65535) {
    throw UsageError("block store: '{}' is no HOST:PORT with a port of 1 to 65535; write localhost:6379", place);
  }
  return {.host = std::string(host), .port = port};
}

RedisStore::RedisStore(const std::string& place, size_t block_bytes, int blocks)
    : RedisStore(parse_redis_address(place), place, block_bytes, blocks) {}

RedisStore::RedisStore(const RedisAddress& address, const std::string& place, size_t block_bytes, int blocks)
    : BlockStore(block_bytes, blocks),
      name_("redis " + place),
      prefix_(make_prefix()),
      touched_(static_cast<size_t>(blocks)),
      reader_(address.host, address.port),
      reading_(name_ + ": reading"),
      writer_(address.host, address.port),
      writing_(name_ + ": writing") {
  if (block_bytes > kMostBlockBytes) {
    throw Error("block store: {} keeps no blocks of {} bytes, {} at most; use disk:DIR", name_, block_bytes,
                kMostBlockBytes);
  }
  probe();
}

// A server that is none, refuses writes or asks for a password is found at the start.
void RedisStore::probe() {
  const std::string key = prefix_ + "probe";
  const std::byte sent{42};
  std::byte back{};
  if (!put(key, 0, {&sent, 1}) || !writer_.send({"UNLINK", key}) || !writer_.receive_integer(1)) {
    throw Error(
        "block store: {} does not keep what it is given ({}); start a Redis or Valkey server there, version 4 or "
        "newer, that asks for no password, or name another",
        name_, writer_.why());
  }
  if (!put(key, 0, {&sent, 1}) || !fetch(key, 0, {&back, 1}) || back != sent || !writer_.send({"UNLINK", key}) ||
      !writer_.receive_integer(1)) {
    throw Error("block store: {} does not give back what it was given ({}); name a server that does", name_,
                reader_.why());
  }
}

RedisStore::~RedisStore() {
  bool there = writer_.open();
  for (int block = 0; there && block < count(); ++block) {
    if (touched_[static_cast<size_t>(block)].load(std::memory_order_relaxed)) {
      // Its reply is awaited at the end; a server that stops in between is not waited for again.
      there = writer_.send({"UNLINK", key(block)});
      while (there && writer_.unread() > 256) {
        there = writer_.receive_integer(0);
      }
    }
  }
  while (there && writer_.unread() > 0) {
    there = writer_.receive_integer(0);
  }
}

std::string RedisStore::key(int block) const {
  return prefix_ + std::to_string(block);
}

bool RedisStore::read(int block, size_t offset, std::span<std::byte> to) {
  check_place(block, offset, to.size());
  if (!holds(block, offset + to.size())) {
    return false;
  }
  if (to.empty()) {
    return true;
  }
  const std::lock_guard lock(reader_mutex_);
  return fetch(key(block), offset, to) ? reading_.worked() : reading_.failed(reader_.why());
}

bool RedisStore::write(int block, size_t offset, std::span<const std::byte> from) {
  check_place(block, offset, from.size());
  if (from.empty()) {
    return true;
  }
  const std::lock_guard lock(writer_mutex_);
  touched_[static_cast<size_t>(block)].store(true, std::memory_order_relaxed);
  if (!put(key(block), offset, from)) {
    return writing_.failed(writer_.why());
  }
  wrote(block, offset + from.size());
  return writing_.worked();
}

bool RedisStore::fetch(const std::string& key, size_t offset, std::span<std::byte> to) {
  return reader_.open() &&
         reader_.send({"GETRANGE", key, std::to_string(offset), std::to_string(offset + to.size() - 1)}) &&
         reader_.receive_bytes(to);
}

// The server works on the three kinds of commands while they come in: one way there and back for all.
bool RedisStore::put(const std::string& key, size_t offset, std::span<const std::byte> from) {
  if (!writer_.open() || !unlink_given(true) || !writer_.send({"SETRANGE", key, std::to_string(offset)}, from) ||
      !writer_.send({"EXPIRE", key, kKeepSeconds})) {
    return false;
  }
  while (writer_.unread() > 2) {
    if (!writer_.receive_integer(0)) {
      return false;
    }
  }
  const size_t end = offset + from.size();
  return writer_.receive_integer(static_cast<long long>(end)) && writer_.receive_integer(1);
}

void RedisStore::forget(int block) {
  if (!touched_[static_cast<size_t>(block)].load(std::memory_order_relaxed)) {
    return;
  }
  {
    const std::lock_guard lock(given_mutex_);
    given_.push_back(block);
  }
  // The engine's thread does not wait: where a write is under way or there is no connection, the next write does it.
  const std::unique_lock lock(writer_mutex_, std::try_to_lock);
  if (lock.owns_lock() && writer_.connected()) {
    unlink_given(false);
  }
}

// The writer's lock is held. false: some are left.
bool RedisStore::unlink_given(bool wait) {
  std::vector<int> given;
  {
    const std::lock_guard lock(given_mutex_);
    given.swap(given_);
  }
  while (!given.empty()) {
    const std::string name = key(given.back());
    if (!(wait ? writer_.send({"UNLINK", name}) : writer_.try_send({"UNLINK", name}))) {
      const std::lock_guard lock(given_mutex_);
      given_.insert(given_.end(), given.begin(), given.end());
      return false;
    }
    given.pop_back();
  }
  return true;
}

}  // namespace vericache
