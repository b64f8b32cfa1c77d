// Servers for tests of the remote block store: a real one, started as a process and killed at will, and one that
// answers what a test tells it to. Each test owns its own, on its thread.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace vericache::test {

// A port of 127.0.0.1 that nobody listened on a moment ago.
int free_port();

class RedisServer {
 public:
  // A file, and the name to start it by; none where no server is installed.
  static std::optional<std::vector<std::string>> program();

  explicit RedisServer(std::vector<std::string> program);
  ~RedisServer();
  RedisServer(const RedisServer&) = delete;
  RedisServer& operator=(const RedisServer&) = delete;

  int port() const { return port_; }
  bool start();  // on the same port every time; false: it does not answer
  void kill();
  // Sends a line, returns what came back at once: "DBSIZE" -> ":0\r\n".
  std::string ask(std::string_view line) const;

 private:
  std::vector<std::string> program_;
  int port_;
  std::string directory_;
  int process_ = -1;
};

// Takes every command of a block store for granted, except that GETRANGE gets what `hostile` sends, if there is one.
class FakeServer {
 public:
  // Sends what it likes on the descriptor; the connection is closed behind it if it says true.
  using Hostile = std::function<bool(int connection)>;

  FakeServer();
  ~FakeServer();
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;

  int port() const { return port_; }
  void set_hostile(Hostile hostile);

 private:
  void serve(int connection);

  int port_ = 0;
  int listener_;
  std::mutex mutex_;
  Hostile hostile_;
  std::vector<int> connections_;
  std::vector<std::thread> serving_;
  std::thread accepting_;
};

}  // namespace vericache::test
