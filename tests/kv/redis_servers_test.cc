// What redis_servers.h declares; it has no tests of its own.
#include "redis_servers.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <sstream>

namespace vericache::test {
namespace {

sockaddr_in local(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int bound_socket(int& port) {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = local(0);
  socklen_t size = sizeof(address);
  if (bind(socket, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    std::abort();
  }
  port = ntohs(address.sin_port);
  return socket;
}

std::string find_in_path(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    folder.append("/").append(name);
    if (access(folder.c_str(), X_OK) == 0) {
      return folder;
    }
  }
  return {};
}

}  // namespace

int free_port() {
  int port = 0;
  close(bound_socket(port));
  return port;
}

// Debian's redis-tools holds the server too: it is one program that looks at its own name.
std::optional<std::vector<std::string>> RedisServer::program() {
  for (const char* name : {"redis-server", "valkey-server", "redis-check-rdb"}) {
    if (std::string file = find_in_path(name); !file.empty()) {
      return std::vector<std::string>{std::move(file), "redis-server"};
    }
  }
  return std::nullopt;
}

RedisServer::RedisServer(std::vector<std::string> program) : program_(std::move(program)), port_(free_port()) {
  std::string name = std::filesystem::temp_directory_path() / "vericache-redis-XXXXXX";
  if (mkdtemp(name.data()) == nullptr) {
    std::abort();
  }
  directory_ = name;
}

RedisServer::~RedisServer() {
  kill();
  std::filesystem::remove_all(directory_);
}

bool RedisServer::start() {
  const std::string port = std::to_string(port_);
  const std::vector<const char*> arguments{program_[1].c_str(),
                                           "--port",
                                           port.c_str(),
                                           "--bind",
                                           "127.0.0.1",
                                           "--save",
                                           "",
                                           "--appendonly",
                                           "no",
                                           "--daemonize",
                                           "no",
                                           "--dir",
                                           directory_.c_str(),
                                           "--io-threads",
                                           "1",
                                           nullptr};
  process_ = fork();
  if (process_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int silent = open("/dev/null", O_RDWR);
    for (int descriptor = 0; descriptor < 3; ++descriptor) {
      dup2(silent, descriptor);
    }
    execv(program_[0].c_str(), const_cast<char* const*>(arguments.data()));
    _exit(127);
  }
  for (int attempt = 0; attempt < 1000; ++attempt) {
    if (ask("PING") == "+PONG\r\n") {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

void RedisServer::kill() {
  if (process_ > 0) {
    ::kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    process_ = -1;
  }
}

std::string RedisServer::ask(std::string_view line) const {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_in address = local(port_);
  std::string said;
  if (connect(socket, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string text = std::string(line) + "\r\n";
    std::array<char, 4096> back{};
    if (::send(socket, text.data(), text.size(), MSG_NOSIGNAL) > 0) {
      const ssize_t size = recv(socket, back.data(), back.size(), 0);
      said.assign(back.data(), static_cast<size_t>(size > 0 ? size : 0));
    }
  }
  close(socket);
  return said;
}

FakeServer::FakeServer() : listener_(bound_socket(port_)) {
  listen(listener_, 16);
  accepting_ = std::thread([this] {
    for (;;) {
      const int connection = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (connection < 0) {
        return;
      }
      const std::lock_guard lock(mutex_);
      connections_.push_back(connection);
      serving_.emplace_back([this, connection] { serve(connection); });
    }
  });
}

FakeServer::~FakeServer() {
  shutdown(listener_, SHUT_RDWR);
  accepting_.join();
  for (const int connection : connections_) {
    shutdown(connection, SHUT_RDWR);
  }
  for (std::thread& thread : serving_) {
    thread.join();
  }
  for (const int connection : connections_) {
    close(connection);
  }
  close(listener_);
}

void FakeServer::set_hostile(Hostile hostile) {
  const std::lock_guard lock(mutex_);
  hostile_ = std::move(hostile);
}

// Finds commands by their names, which the tests' bytes do not hold.
void FakeServer::serve(int connection) {
  struct Answer {
    std::string_view command, reply;
  };
  constexpr Answer kAnswers[] = {
      {"SETRANGE", ":4096\r\n"}, {"EXPIRE", ":1\r\n"}, {"UNLINK", ":1\r\n"}, {"GETRANGE", "$1\r\n*\r\n"}};
  std::string seen;
  std::array<char, 65536> chunk{};
  for (ssize_t size = 0; (size = recv(connection, chunk.data(), chunk.size(), 0)) > 0;) {
    seen.append(chunk.data(), static_cast<size_t>(size));
    for (;;) {
      size_t first = std::string::npos;
      const Answer* found = nullptr;
      for (const Answer& answer : kAnswers) {
        if (const size_t at = seen.find(answer.command); at < first) {
          first = at;
          found = &answer;
        }
      }
      if (found == nullptr) {
        break;
      }
      seen.erase(0, first + found->command.size());
      Hostile hostile;
      if (found->command == "GETRANGE") {
        const std::lock_guard lock(mutex_);
        hostile = hostile_;
      }
      if (hostile != nullptr) {
        if (hostile(connection)) {
          shutdown(connection, SHUT_RDWR);
          return;
        }
      } else if (::send(connection, found->reply.data(), found->reply.size(), MSG_NOSIGNAL) < 0) {
        return;
      }
    }
  }
}

}  // namespace vericache::test
